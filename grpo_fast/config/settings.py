"""Every setting of a training run: frozen dataclasses, and the checks that need no model.

The sections are the tables of the TOML file and the prefixes of the flags: `optim.lr` is `lr` under
`[optim]` in a file and `--optim.lr` on the command line (`command_line.py`). The line under each field is
its `--help`. The defaults are those of the miniature, the run that needs no download.

Building a `TrainConfig` checks it: a value out of range or two settings that contradict each other raise
`FieldError`, which names the field. Nothing here needs torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from grpo_fast.config.check import check
from grpo_fast.config.engine_settings import EngineSettings, MemorySettings, ParallelSettings
from grpo_fast.config.limit_settings import LimitSettings

Preset = Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "sapo", "vespo", "luspo", "rloo", "reinforce_pp"]


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every command has."""

    name: str = ""
    """Name of the run and of its folder; empty: made from the model's name and the time."""
    output_dir: str = "runs"
    """Folder that holds the folders of the runs."""
    seed: int = 0
    """Seed of everything that is random."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a CUDA device when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type (master weights are float32); auto: bfloat16 on a CUDA device, else float32."""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice."""


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Which of a model's weights are trained."""

    lora_rank: int = 0
    """Rank of the LoRA adapter; 0 trains every weight."""
    lora_alpha: float = 32.0
    """LoRA: the adapter's output is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("all-linear",)
    """LoRA: names of the linear layers that get an adapter; all-linear is every one but the head."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: about a third more work, far less memory."""


@dataclass(frozen=True, kw_only=True)
class PolicySettings(AdapterSettings):
    """The model that is trained."""

    model: str = ""
    """Folder or hub id of a causal language model; empty: the miniature's own."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: the frozen weights under a LoRA adapter in 4 bits (QLoRA), head and embedding excepted; extra lowbit."""
    merge_on_save: bool = False
    """LoRA: save the merged model at the end instead of the adapter alone."""
    liger: bool = False
    """Liger's RMSNorm, rotary embedding and gated MLP in the body of the model; needs a CUDA device."""
    compile: Literal["off", "auto", "on"] = "auto"
    """torch.compile of the layers in training; auto: where it measured faster (so far nowhere: CUDA is unmeasured)."""
    backend: Literal["auto", "torch", "triton", "fused"] = "auto"
    """Kernels of the loss head; auto takes triton on a CUDA device and torch elsewhere (fused: not measured yet)."""
    attention: Literal["auto", "flash", "torch", "flex", "sdpa", "reference"] = "auto"
    """Attention of packed rows (policy and reward models); auto: the fastest that passes a check on this machine."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The prompts."""

    prompts: str = ""
    """Training prompts: .jsonl, .json, .parquet or .csv file, or hub id[:subset]; empty: the miniature's."""
    eval_prompts: str = ""
    """Held-out prompts, the same forms; empty: evenly spaced rows leave the training prompts."""
    prompt_column: str = "prompt"
    """Column of the prompt, a text or a list of chat messages; where it is absent, messages is read."""
    split: str = "train"
    """Hub data sets: the split the training prompts come from."""
    eval_split: str = "test"
    """Hub data sets: the split the held-out prompts come from."""
    max_prompt_tokens: int = 512
    """Longest prompt accepted, in tokens, chat template included; a longer one is an error."""
    eval_size: int = 256
    """Held-out prompts evaluated before, during and after training (the miniature's too)."""
    system_prompt: str = ""
    """System message put before every prompt that has none (it makes plain prompts chats)."""


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """The objectives: heads of reward models, a judge's rubrics, Python functions, or several of these."""

    model: tuple[str, ...] = ()
    """Reward models, folders or hub ids ([name=]model); those with the same heads are an ensemble; empty: none."""
    functions: tuple[str, ...] = ()
    """Python reward functions, each module:function; the working directory is importable."""
    weights: dict[str, float] = field(default_factory=dict[str, float])
    """Weight of each objective, name=number ...; empty: 1 for all; negative turns one around."""
    directions: dict[str, Literal["max", "min"]] = field(default_factory=dict[str, Literal["max", "min"]])
    """Objectives to be lowered, name=min ...; unnamed ones are raised (max)."""
    lower_bounds: dict[str, float] = field(default_factory=dict[str, float])
    """Objectives rewarded by score - k * spread, name=k ...: what the reward model is unsure of is worth less."""
    thresholds: dict[str, float] = field(default_factory=dict[str, float])
    """Objectives rewarded by 1 where the score is at least this and 0 below, name=number ..."""
    floors: dict[str, float] = field(default_factory=dict[str, float])
    """Objectives held at this mean score while the others are maximised (Lagrange multipliers), name=number ..."""
    calibrated: bool = False
    """Put reward models' scores through the calibration that was fitted on held-out labels when they were trained."""
    overlong_buffer: int = 0
    """DAPO's overlong shaping: an objective `overlong` that falls from 0 to -1 over this many last tokens; 0: none."""
    floor_lr: float = 0.05
    """Step size of the multipliers, in weights a step for a gap of one standard deviation."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Score finished groups while others are still generated; auto: on a CUDA device. Changes speed alone."""
    timeout_s: float = 60.0
    """Seconds a reward function may take for one batch; then its process is killed and reward.on_failure applies."""
    workers: int = 8
    """Reward functions that run at the same time."""
    memory_limit_gib: float = 0.0
    """Memory each reward function's process may allocate, in GiB; 0: no limit."""
    on_failure: Literal["stop", "missing"] = "stop"
    """Completions a reward function fails on: stop the run and name one, or count their scores as missing."""
    isolation: Literal["process", "thread"] = "process"
    """Each reward function in a process of its own, or in threads of the trainer, which nothing can stop."""


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """A language model on your own server that rates completions by rubrics."""

    url: str = ""
    """Base of its OpenAI-compatible interface, http://127.0.0.1:8000/v1; empty: no judge."""
    model: str = ""
    """Name of the model there."""
    rubrics: dict[str, str] = field(default_factory=dict[str, str])
    """Objectives and what it means to be good at each, name=text ..."""
    scale: tuple[float, float] = (0.0, 10.0)
    """The judge answers with a number on this scale; rewards are mapped to [0, 1]."""
    timeout_s: float = 60.0
    """Seconds one request may take."""
    retries: int = 3
    """Times a request that fails for a passing reason is sent again."""
    concurrency: int = 16
    """Requests under way at the same time."""
    max_tokens: int = 16
    """Longest answer, in tokens."""
    cache: str = ""
    """Folder of answers already given, which are not asked for again; empty: none."""
    api_key_env: str = ""
    """NAME of the environment variable that holds the server's key; empty: no key."""


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """Sampling of the completions."""

    prompts_per_step: int = 16
    """Prompts of one step."""
    group_size: int = 8
    """Completions of each prompt, compared with one another; at least 2."""
    max_new_tokens: int = 64
    """Longest completion, in tokens (256 when policy.model is given and this is not)."""
    temperature: float = 1.0
    """Sampling temperature; the loss uses the same."""
    top_k: int = 0
    """Sample among the k likeliest tokens only; 0: all (needs loss.mismatch)."""
    top_p: float = 1.0
    """Sample among the likeliest tokens of this total probability only (needs loss.mismatch)."""
    min_p: float = 0.0
    """Drop tokens below this fraction of the likeliest one's probability (needs loss.mismatch)."""
    max_rows: int = 256
    """Completions generated at the same time; bounds the memory of the key-value cache."""
    refill: int = 0
    """Rounds in which groups that give no signal are replaced by groups of other prompts (DAPO); 0: none."""
    rest: int = 0
    """Most times in a row a prompt whose last groups gave no signal is passed over; 0: never."""
    ahead: bool = False
    """Generate the next batch while this one trains, by a copy of the weights one step older (needs loss.mismatch)."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion besides the tokenizer's and the model's own."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a completion, wherever their tokens begin and end; what completes them belongs to it."""

    @property
    def truncates(self) -> bool:
        """Whether some tokens are made impossible, so that completions have another distribution than is trained."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(frozen=True, kw_only=True)
class AdvantageSettings:
    """How the rewards of a group become advantages."""

    mode: Literal["auto", "scalarized", "per_head", "gdpo", "dvao", "leave_one_out"] = "auto"
    """Several rewards to one advantage; auto: the loss preset's own, else gdpo; the paper: scalarized."""
    scale: Literal["auto", "group", "batch", "none"] = "auto"
    """What the centred rewards are divided by; auto: the loss preset's own, else group."""
    std_floor: float = 0.0
    """Groups whose rewards spread less than this give no signal and are skipped."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The loss: a preset, and any part of it replaced."""

    preset: Preset = "grpo"
    """Published loss to start from; a field left at None below keeps the preset's value."""
    ratio_level: Literal["token", "sequence"] | None = None
    """Probability ratio of each token, or one of the whole sequence (GSPO)."""
    surrogate: Literal["clip", "cispo", "sapo", "gamma", "reinforce"] | None = None
    """How ratio and advantage make the loss."""
    clip_low: float | None = None
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float | None = None
    """The ratio is clipped above at 1 + clip_high."""
    ratio_cap: float | None = None
    """Upper bound of the ratio in the unclipped branch too."""
    dual_clip: float | None = None
    """Lower bound of the loss at negative advantages, as a multiple of them; above 1."""
    sapo_tau_pos: float | None = None
    """SAPO: steepness of the gate at positive advantages."""
    sapo_tau_neg: float | None = None
    """SAPO: steepness of the gate at negative advantages."""
    gamma_pos: tuple[float, float] | None = None
    """VESPO: k and lambda of the gamma weight at positive advantages."""
    gamma_neg: tuple[float, float] | None = None
    """VESPO: k and lambda of the gamma weight at negative advantages."""
    kl: Literal["k1", "k2", "k3", "k3_corrected"] | None = None
    """Estimator of the KL divergence from the reference."""
    kl_coef: float | None = None
    """Weight of the KL term (beta); 0 loads no reference model."""
    mismatch: Literal["none", "truncate", "mask", "sequence_mask"] | None = None
    """Correction for the sampler's log-probabilities differing from the trainer's."""
    mismatch_low: float | None = None
    """Tokens or sequences whose trainer-to-sampler ratio is below this are masked."""
    mismatch_high: float | None = None
    """The trainer-to-sampler ratio is cut (truncate) or masked (mask) above this."""
    entropy_quantile: float | None = None
    """Train only on the tokens whose entropy is in this top fraction."""
    off_policy_threshold: float | None = None
    """Drop sequences of negative advantage whose mean log-ratio old to new passes this."""
    entropy_coef: float | None = None
    """Weight of the entropy bonus."""
    aggregation: Literal["sequence_mean", "token_mean", "constant"] | None = None
    """Divide the token losses by sequence lengths, by all tokens, or by a constant."""
    mask_truncated: bool = False
    """Leave completions that were cut off at the length limit out of the loss."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The optimizer."""

    lr: float = 2.5e-4
    """Peak learning rate (when policy.model is given and this is not: 1e-6, with LoRA 1e-5)."""
    optimizer: Literal["adamw", "adamw8bit", "adafactor"] = "adamw"
    """adamw keeps 8 bytes of state a parameter, adamw8bit 2 (extra lowbit), adafactor next to none."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW: decay of the running mean and of the running square of the gradient."""
    eps: float = 1e-8
    """AdamW: added to the root of the running square."""
    warmup_steps: int = 5
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: held, or lowered to 0 at the last step."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to this; 0: never."""
    updates_per_rollout: int = 1
    """Passes over each batch of completions."""
    minibatches: int = 1
    """Optimizer steps in each pass, every one on its share of the prompts."""
    token_budget: int = 8192
    """Tokens of one packed forward pass; changes memory and speed, never the gradient."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Length of the run and what it leaves behind."""

    steps: int = 110
    """Training steps."""
    eval_every: int = 20
    """Evaluate on held-out prompts every so many steps; 0: before and after only."""
    save_every: int = 50
    """Save a checkpoint every so many steps; 0: at the end and on interruption only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    checkpoint: Literal["sharded", "full"] = "sharded"
    """Several processes: each writes its shards, or one of them the whole; any number can go on with either."""
    save_async: bool = True
    """Write checkpoints while training goes on; a step waits for a copy in the host's memory, which must hold it."""
    max_dumps: int = 3
    """Skipped steps (non-finite loss or gradient) of which batch and weights are kept for a replay; 0: none."""
    wandb: bool = False
    """Log to Weights & Biases too (TensorBoard always)."""
    samples: int = 8
    """Held-out prompts whose completions are written to samples.jsonl and shown in the report."""


@dataclass(frozen=True, kw_only=True)
class MiniatureWorld:
    """The embedded world: used when no model is given."""

    hidden: int = 128
    """Hidden size of its models."""
    layers: int = 3
    """Layers of its models."""
    heads: int = 4
    """Attention heads of its models."""
    labelled: int = 12000
    """Replies with noisy, partly missing labels the reward model is trained on."""


@dataclass(frozen=True, kw_only=True)
class MiniatureSettings(MiniatureWorld):
    """The embedded world: used when policy.model is empty."""

    demonstrations: int = 10000
    """Good and bad replies the warm start is trained on."""
    warm_epochs: int = 2
    """Passes of the warm start over the demonstrations."""
    warm_lr: float = 2e-3
    """Peak learning rate of the warm start."""
    reward_epochs: int = 2
    """Passes of the reward model's training over the labelled replies; it starts from the warm-started policy."""
    reward_lr: float = 2e-3
    """Peak learning rate of the reward model's training."""
    batch_size: int = 32
    """Sequences in one optimizer step of the warm start and of the reward model's training."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonConfig):
    """Align a language model on several objectives at once with Group Relative Policy Optimization."""

    policy: PolicySettings = field(default_factory=PolicySettings)
    """The model that is trained."""
    data: DataSettings = field(default_factory=DataSettings)
    """The prompts."""
    reward: RewardSettings = field(default_factory=RewardSettings)
    """The objectives: heads of reward models, a judge's rubrics, Python functions, or several of these."""
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    """A language model on your own server that rates completions by rubrics."""
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    """Sampling of the completions."""
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What generates the completions."""
    memory: MemorySettings = field(default_factory=MemorySettings)
    """What may be used, and what is moved aside to fit."""
    advantage: AdvantageSettings = field(default_factory=AdvantageSettings)
    """How the rewards of a group become advantages."""
    loss: LossSettings = field(default_factory=LossSettings)
    """The loss: a preset, and any part of it replaced."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """The optimizer."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """What several processes (torchrun) share out, and how; one process ignores it."""
    limits: LimitSettings = field(default_factory=LimitSettings)
    """Numbers of a step over which a run warns, and stops after `patience` such steps in a row; 0: no limit."""
    run: RunSettings = field(default_factory=RunSettings)
    """Length of the run and what it leaves behind."""
    miniature: MiniatureSettings = field(default_factory=MiniatureSettings)
    """The embedded world: used when policy.model is empty."""

    def __post_init__(self) -> None:
        check(self)
