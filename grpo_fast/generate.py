"""Talk to a trained model: `python -m grpo_fast.generate RUN "prompt…"`.

Prompts are treated as in training (chat template, system prompt, stop tokens, sampling) and completions are
scored by the run's reward model where it has one. Without a prompt on the command line every line of standard
input is one.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import transformers

from grpo_fast.config.command_line import parse
from grpo_fast.config.settings import TrainConfig
from grpo_fast.data.prompts import Row, tokenize
from grpo_fast.engines.choose import builtin_engine
from grpo_fast.errors import UserError
from grpo_fast.models.policy import Policy
from grpo_fast.models.pretrained import decoded, position_limit
from grpo_fast.models.reward_model import RewardModel
from grpo_fast.models.reward_set import RewardSet, read_saved
from grpo_fast.run.command import Parser, run_command
from grpo_fast.run.metrics import read_summary
from grpo_fast.run.terminal import replace_unprintable
from grpo_fast.shown import plain_text
from grpo_fast.task import sampling_of
from grpo_fast.typed import rows


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One completion and its score on each objective of the reward model."""

    text: str
    scores: dict[str, float]
    tokens: int
    cut: bool
    """Whether it was ended by the length limit."""


class Speaker:
    """A run's model, ready to answer."""

    def __init__(self, run: Path | str, *, chat: bool | None = None) -> None:
        """Load RUN/model and, where there is one, its reward model, onto a CUDA device if there is any.

        `chat`: apply the chat template; None: as the run's summary says, else where the tokenizer has one.
        Raises UserError for a folder that is no run, a run that is not finished, and a model that cannot be
        read.
        """
        run = Path(run)
        model = _finished_model(run)
        self.config = (
            parse(["--config", str(run / "config.toml")]).config
            if (run / "config.toml").is_file()
            else TrainConfig()
        )
        device, dtype = _device_and_dtype()
        self.policy = Policy.load(model, device=device, dtype=dtype)
        self.policy.eval()
        self.engine = builtin_engine(
            self.policy,
            max_rows=self.config.rollout.max_rows,
            settings=replace(self.config.engine, cuda_graphs="off"),  # a few answers are not worth a capture
            decode=self._decode,
        )
        template = bool(getattr(self.policy.tokenizer, "chat_template", None))
        recorded = (read_summary(run) or {}).get("prompt_format")
        self.chat = (recorded != "plain" and template) if chat is None else chat
        judge = run / "reward_model"
        saved = read_saved(self.config.reward.model or ([str(judge)] if judge.is_dir() else []))
        models = [RewardModel.load(model, device=device, dtype=dtype) for model in saved]
        self.rewards = RewardSet.of(models) if models else None

    def _decode(self, token_ids: list[int]) -> str:
        return decoded(self.policy.tokenizer, token_ids)

    def answer(
        self,
        prompt: str,
        *,
        samples: int = 1,
        seed: int = 0,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
    ) -> list[Answer]:
        """`samples` completions; the same arguments give the same ones. None: the run's own setting."""
        text = prompt.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        if not text.strip():
            raise UserError("the prompt is empty")
        asked = [{"role": "user", "content": text}] if self.chat else text
        system = self.config.data.system_prompt if self.chat else ""
        [encoded] = tokenize([Row(asked, {}, "prompt")], self.policy.tokenizer, system_prompt=system)
        rollout = self.config.rollout
        if temperature is not None:
            rollout = replace(rollout, temperature=temperature)
        if max_new_tokens is not None:
            rollout = replace(rollout, max_new_tokens=max_new_tokens)
        sampling = sampling_of(rollout, self.policy)
        limit, why = position_limit(self.policy.model.config) or (None, "")
        given, new = len(encoded.token_ids), sampling.max_new_tokens
        if limit and given + new > limit:
            raise UserError(
                f"the prompt has {given} tokens: {new} new ones would pass the model's limit of {limit}{why}; "
                "shorten it or lower --max-new-tokens"
            )
        completions = self.engine.generate([encoded.token_ids], samples, sampling, seed)
        texts = [self._decode(c.token_ids) for c in completions]
        scores: list[dict[str, float]] = [{} for _ in texts]
        if self.rewards:
            asked = [encoded.messages or encoded.text] * samples
            table = rows(self.rewards.predict(asked, texts, token_budget=8192).scores)
            scores = [dict(zip(self.rewards.names, row, strict=True)) for row in table]
        return [
            Answer(text=text, scores=score, tokens=len(c.token_ids), cut=c.finish_reason == "length")
            for text, score, c in zip(texts, scores, completions, strict=True)
        ]


def shown(answer: Answer) -> str:
    """An answer for a terminal: its text, harmless, and a line of scores."""
    notes = [f"{plain_text(name, one_line=True)} {score:.3f}" for name, score in answer.scores.items()]
    if answer.cut:
        notes.append(f"[cut after {answer.tokens} tokens]")
    return "\n".join([plain_text(answer.text) or "(empty)", *(["  " + "  ".join(notes)] if notes else [])])


def main(argv: list[str] | None = None) -> int:
    """`python -m grpo_fast.generate RUN [PROMPT ...]`."""
    parser = Parser(prog="python -m grpo_fast.generate", description="Let a trained model answer prompts.")
    parser.add_argument("run", help="folder of a finished run, for example runs/miniature")
    parser.add_argument("prompt", nargs="*", help="prompts; none: every line of standard input is one")
    parser.add_argument("--samples", type=int, default=1, help="completions of each prompt (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the run's)")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion (default: the run's)")
    parser.add_argument(
        "--format", choices=["chat", "plain"], help="apply the chat template or not (default: as in training)"
    )
    asked = parser.parse_args(argv)
    if asked.samples < 1:
        raise UserError(f"--samples must be at least 1, got {asked.samples}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    speaker = Speaker(asked.run, chat=None if asked.format is None else asked.format == "chat")
    replace_unprintable(sys.stdout)
    answered = 0
    for prompt in asked.prompt or _lines(sys.stdin):
        answers = speaker.answer(
            prompt,
            samples=asked.samples,
            seed=asked.seed,
            temperature=asked.temperature,
            max_new_tokens=asked.max_new_tokens,
        )
        if len(asked.prompt) > 1 or not (
            asked.prompt or sys.stdin.isatty()
        ):  # else one can see what was asked
            print(("" if answered == 0 else "\n") + "› " + plain_text(prompt, one_line=True))
        print("\n\n".join(map(shown, answers)), flush=True)
        answered += 1
    if not answered:
        raise UserError("no prompt: give one after the run's folder, or one a line on standard input")
    return 0


def _lines(file: Iterable[str]) -> Iterator[str]:
    """The prompts typed or piped in, empty lines left out."""
    typed = sys.stdin.isatty()
    if typed:
        print("One prompt a line, Ctrl-D ends.", file=sys.stderr)
    for line in file:
        if line.strip():
            yield line.strip()


def _finished_model(run: Path) -> Path:
    if not run.is_dir():
        raise UserError(
            f"{run}: expected the folder of a run, found {'a file' if run.exists() else 'nothing'}"
        )
    model = run / "model"
    if model.is_dir():
        return model
    if (run / "config.toml").is_file():
        raise UserError(
            f"{run} did not finish, it has no model yet: go on with python -m grpo_fast.train --resume {run}"
        )
    raise UserError(f"{run} is not the folder of a run: it has no config.toml and no model")


def _device_and_dtype() -> tuple[str, str]:
    import torch

    return ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")


if __name__ == "__main__":
    run_command(main)
