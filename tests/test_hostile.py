"""Texts of others act on nobody: not on a page, not on a terminal, not on a folder; and no secret is repeated."""

import io
import json
import os
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from rich.table import Table

from grpo_fast.config.command_line import parse
from grpo_fast.config.resolve import check_paths
from grpo_fast.errors import UserError
from grpo_fast.models.policy_files import SavedPolicy
from grpo_fast.models.pretrained import load_tokenizer
from grpo_fast.report.compare_page import read_runs
from grpo_fast.report.compare_page import render as compare_page
from grpo_fast.report.page import write_report
from grpo_fast.report.reward_page import write_reward_report
from grpo_fast.run import checkpoint
from grpo_fast.run.command import run_command
from grpo_fast.run.metrics import RunLogger, write_atomically
from grpo_fast.run.progress import Progress
from grpo_fast.run.terminal import Terminal
from grpo_fast.shown import LONGEST, error_line, plain_text, without_secrets
from grpo_fast.train import main
from tests.audit import audit
from tests.fuzz.run_targets import FILES, MEAN, written
from tests.judge_server import MODEL, JudgeServer
from tests.tiny import save_policy, write_prompts
from tests.tiny_models import byte_tokenizer, causal_model

SECRET = "recognisable-secret-7f3a"
PAYLOADS = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "'><svg onload=document.title='owned'>",
    '"/><a href="javascript:document.title=1">click</a>',
    "</title></style></pre></textarea><iframe srcdoc='<script>1</script>'>",
    "<!-- ", "-->", "]]>", "&lt;script&gt;", "{{ 7 * 7 }}{% raw %}", "javascript:alert(1)", "$\\frac{", "$x_1$ a$b",
    "\x1b[2J\x1b]0;owned\x07", "\x9b31m", "\u202eevil", "\x00", "[bold red]x[/bold red]", "[link=https://evil.example]x[/link]",
    ":smile:", "\r\nerror: forged", "\u2028",
]  # fmt: skip
HARMLESS = {
    *(
        "class",
        "d",
        "x",
        "y",
        "x1",
        "x2",
        "y1",
        "y2",
        "cx",
        "cy",
        "r",
        "rx",
        "width",
        "height",
        "viewbox",
        "role",
        "lang",
    ),
    *(
        "aria-label",
        "style",
        "stroke",
        "fill",
        "opacity",
        "transform",
        "text-anchor",
        "data-label",
        "name",
        "content",
    ),
    *("charset", "http-equiv", "stroke-dasharray", "open", "colspan"),
}


class Page(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles |= {value or "" for name, value in attrs if name == "style"}

    def handle_data(self, data):
        self.text += data


def hostile_run(folder: Path, payload: str) -> Path:
    """A run in which every text of others, and every name, is the payload."""
    folder.mkdir(parents=True)

    def swapped(value):
        if isinstance(value, dict):
            keep = ("phase", "step", "when")
            return {
                swapped(key)
                if key in ("safety", "tone", "torch", "padding")
                else key.replace("safety", payload)
                if "/" in key
                else key: item if key in keep else swapped(item)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [swapped(item) for item in value]
        return payload if isinstance(value, str) else value

    for name, content in FILES.items():
        rows = swapped(content)
        if isinstance(content, str):
            text = f"name = {json.dumps(payload)}\nnote = {json.dumps('x')}\n# {plain_text(payload, one_line=True)}\n"
        else:
            text = "\n".join(json.dumps(row) for row in (rows if isinstance(rows, list) else [rows]))
        (folder / name).write_text(text, encoding="utf-8")
    return folder


PAGES = (write_report, write_reward_report, lambda run: _compared(run))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> list[set[str]]:
    """The elements of each page of a run without hostile texts."""
    run = hostile_run(tmp_path_factory.mktemp("sound") / "run", "word")
    return [Page(write(run).read_text(encoding="utf-8")).tags for write in PAGES]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_pages_hold_no_element_and_no_attribute_of_the_data(tmp_path, payload, sound):
    run = hostile_run(tmp_path / "run", payload)
    for write, tags in zip(PAGES, sound, strict=True):
        page = Page(write(run).read_text(encoding="utf-8"))
        assert page.tags <= tags and not page.tags & {
            "script",
            "iframe",
            "a",
            "img",
            "object",
            "embed",
            "base",
        }
        assert page.attributes <= HARMLESS and not [name for name in page.attributes if name.startswith("on")]
        assert not [style for style in page.styles if "url(" in style or "expression" in style]
        seen = plain_text(payload)
        assert " ".join(seen.split())[:15] in " ".join(page.text.split()), "the text itself is shown"


def _compared(run: Path) -> Path:
    other = run.parent / "other"
    if not other.exists():
        hostile_run(other, "other word")
    page = run.parent / "compare.html"
    page.write_text(compare_page(read_runs([run, other])), encoding="utf-8")
    return page


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_terminal_gets_text(payload):
    said = io.StringIO()
    console = Terminal(file=said, width=400, force_terminal=False)
    table = Table(payload, title=payload)
    table.add_row(payload)
    console.print(table)
    console.print(payload)
    with Progress([payload], file=said) as progress:
        progress.phase("grpo", 3)
        progress.message(payload)
        progress.update(1, {f"reward/{payload}": 0.5, "loss": 1.0})
        progress.sample(payload, payload)
    text = said.getvalue()
    assert plain_text(text) == text
    for markup in ("[bold red]x[/bold red]", "[link=https://evil.example]x[/link]", ":smile:"):
        if payload == markup:
            assert text.count(markup) >= 3  # as it is written, and nothing else


@pytest.mark.parametrize("payload", PAYLOADS)
def test_an_error_is_one_plain_line(payload, capsys):
    def fails():
        raise UserError(f"x got {payload} and {payload * 400}")

    def without_file():
        raise OSError(2, "No such file", f"/tmp/{payload}")

    for command in (fails, without_file):
        with pytest.raises(SystemExit) as ended:
            run_command(command)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and said.endswith("\n")
        assert plain_text(said[:-1], one_line=True) == said[:-1] and len(said) < LONGEST + 20


def test_a_dollar_in_a_name_is_drawn_as_one():
    from benchmarks import figures

    figure, axes = figures.plt.subplots()
    axes.set_title("$\\frac{ a $ b")
    axes.plot([1, 2], label="$x_1$")
    axes.legend()
    figure.savefig(io.BytesIO(), format="png")  # mathtext would refuse it
    figures.plt.close(figure)


# ---- secrets ----


def test_secrets_of_addresses_are_hidden():
    for text in (
        f"http://user:{SECRET}@host/v1",
        f"https://{SECRET}@host",
        f"http://host/v1?api_key={SECRET}&a=1",
        f"see http://h/?x=1&access_token={SECRET}, please",
        f"http://h/;token={SECRET}",
        f"postgres://a:{SECRET}@h/d",
    ):
        assert SECRET not in without_secrets(text) and "[hidden]" in without_secrets(text)
        assert SECRET not in error_line(text) and SECRET not in str(UserError(f"x {text} y"))
    for text in ("a@b.example", "http://host/v1?model=x", "key = value", "x/y@z"):
        assert without_secrets(text) == text


@pytest.mark.parametrize(
    "words",
    [
        ["--judge.url", f"http://user:{SECRET}@127.0.0.1:1/v1"],
        [
            "--judge.url",
            f"http://127.0.0.1:1/v1?key={SECRET}",
            "--judge.model",
            "m",
            "--judge.rubrics",
            "a=b",
        ],
        ["--judge.url", f"http://user:{SECRET}@h/v1", "surplus"],
        ["--engine.kind", "vllm", "--engine.url", f"http://user:{SECRET}@127.0.0.1:1"],
        ["--engine.url", f"http://127.0.0.1:1/?token={SECRET}"],
        ["--policy.model", f"https://u:{SECRET}@h/model", "--data.prompts", "p", "--reward.functions", "m:f"],
    ],
)
def test_no_message_repeats_a_secret(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        check_paths(parse(words).config)
    assert SECRET not in str(refused.value) and not list(tmp_path.iterdir())


def test_a_run_with_a_key_leaves_no_trace_of_it(tmp_path, monkeypatch, capfd):
    """A whole short run whose judge wants a key, and everything that it printed and wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    write_prompts(tmp_path / "prompts.jsonl", 6)
    save_policy(tmp_path / "policy", "llama")
    with JudgeServer(key=SECRET) as server:
        words = (
            f"--policy.model ./policy --data.prompts prompts.jsonl --data.eval_size 2 --name r --run.steps 1 "
            f"--judge.url {server.url} --judge.model {MODEL} --judge.rubrics kind=good --judge.cache cache "
            "--judge.api_key_env JUDGE_KEY --rollout.max_new_tokens 4 --rollout.prompts_per_step 2 "
            "--rollout.group_size 2 --threads 1"
        )
        with pytest.raises(SystemExit) as ended:
            main(words.split())
    said = "".join(capfd.readouterr())
    assert ended.value.code == 0, said
    written = [
        path for folder in ("runs", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()
    ]
    assert len(written) > 8 and "JUDGE_KEY" in (tmp_path / "runs" / "r" / "config.toml").read_text()
    assert SECRET not in said and not [path for path in written if SECRET.encode() in path.read_bytes()]


# ---- models that bring programs ----


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "policy"
    causal_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_model_s_own_program_is_never_run(policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'owned')!r}).write_text('x')\nclass C: ...\n"
    config = json.loads((policy / "config.json").read_text())
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in policy.iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    (foreign / "trap.py").write_text(trap)
    (foreign / "config.json").write_text(
        json.dumps(config | {"model_type": "unheard-of", "auto_map": {"AutoConfig": "trap.C"}})
    )  # fmt: skip
    with pytest.raises(UserError, match=r"brings its own program \(auto_map\), which is never run here"):
        SavedPolicy.read(foreign)
    # a kind that transformers has itself: its class is taken, the program is not
    (foreign / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "trap.C"}}))
    assert SavedPolicy.read(foreign).config.model_type == "llama"
    chosen = json.loads((foreign / "tokenizer_config.json").read_text())
    chosen |= {"tokenizer_class": "Unheard", "auto_map": {"AutoTokenizer": ["trap.C", "trap.C"]}}
    (foreign / "tokenizer_config.json").write_text(json.dumps(chosen))
    try:
        load_tokenizer(foreign, "model")
    except UserError as error:
        assert "auto_map" in str(error) or "tokenizer" in str(error)
    assert not (tmp_path / "owned").exists()


class _Trap:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "adapter_model.bin"])
def test_pickled_weights_are_never_read(policy, tmp_path, monkeypatch, name):
    from grpo_fast.models.policy import Policy

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in policy.iterdir():
        if not file.name.endswith("safetensors"):
            (folder / file.name).write_bytes(file.read_bytes())
    if name.startswith("adapter"):
        adapter = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(policy),
            "r": 2,
            "target_modules": ["q_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"weight": _Trap()}, folder / name)
    with pytest.raises(UserError, match=rf"weights are pickled \({name}\), and a pickle can run any program"):
        Policy.load(folder)
    assert not (tmp_path / "owned").exists()


# ---- a run's folder stays inside itself ----


@pytest.mark.parametrize("name", ["..", ".", "../x", "/abs", "a/b", "a\\b", "a\x00b", "\x1bx"])
def test_names_that_are_no_folder_are_refused(name):
    with pytest.raises(UserError, match="name must be the name of one folder"):
        parse(["--name", name])


def run_folder(place: Path) -> Path:
    run = place / "runs" / "r"
    run.mkdir(parents=True)
    for name in ("metrics.jsonl", "samples.jsonl", "config.toml"):
        (run / name).write_bytes(written(name))
    return run


@pytest.mark.parametrize(
    "link", ["checkpoints", "tensorboard", "metrics.jsonl", "model", "samples.jsonl", "summary.json"]
)
def test_a_run_does_not_write_through_a_link(tmp_path, link):
    run, outside = run_folder(tmp_path), tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("untouched")
    (run / link).unlink(missing_ok=True)
    (run / link).symlink_to(outside if "." not in link else outside / "file")
    with pytest.raises(UserError, match=f"{link} is a symbolic link"):
        RunLogger.resume(run, phase="grpo", step=2)
    with pytest.raises(UserError, match=f"{link} is a symbolic link"):
        checkpoint.save(run, 3, {"model": {"w": torch.ones(2)}}, {})
    assert [path.name for path in outside.iterdir()] == ["file"] and (
        outside / "file"
    ).read_text() == "untouched"


def test_checkpoints_are_deleted_and_read_inside_alone(tmp_path):
    run, outside = run_folder(tmp_path), tmp_path / "outside"
    for step in (1, 2):
        checkpoint.save(run, step, {"model": {"w": torch.ones(2)}}, {"step": step}, keep=5)
    first, second = (run / "checkpoints" / f"step-00000{step}" for step in (1, 2))
    second.rename(outside)
    second.symlink_to(outside)
    assert checkpoint.latest(run) == first, "a link is no checkpoint"
    second.unlink()
    checkpoint.save(run, 2, {"model": {"w": torch.ones(2)}}, {"step": 2}, keep=5)
    (second / "model.safetensors").rename(tmp_path / "elsewhere")
    (second / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    assert "missing" in str(checkpoint.verify(second))
    manifest = json.loads((first / "manifest.json").read_text())
    entry = manifest["files"].pop("model.safetensors")
    manifest["files"]["../../x.safetensors"] = entry
    manifest["aliases"] = {"../../x": {}}
    (first / "manifest.json").write_text(json.dumps(manifest))
    (run / "x.safetensors").write_bytes((tmp_path / "elsewhere").read_bytes())
    assert "missing" in str(checkpoint.verify(first))
    assert (outside / "model.safetensors").is_file()


def test_a_planted_temporary_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / f".summary.json.tmp-{os.getpid()}").symlink_to(victim)
    write_atomically(tmp_path / "summary.json", "new")
    assert victim.read_text() == "untouched" and (tmp_path / "summary.json").read_text() == "new"
    assert not (tmp_path / "summary.json").is_symlink()


def test_damaged_logs_are_named(tmp_path):
    run = run_folder(tmp_path)
    for row, message in (
        ({"phase": "grpo", "step": -1}, "'step' must be a whole number"),
        ({"phase": "grpo", "step": 1, "loss": [1]}, "'loss' must be a number, a text"),
        ({"phase": "other", "step": 1}, "'phase' must be one of"),
    ):
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n\n")
        with pytest.raises(UserError, match=rf"metrics.jsonl, line 1: .*{message}"):
            write_report(run)
    (run / "metrics.jsonl").unlink()
    (run / "summary.json").write_text(
        json.dumps({"objectives": {"a": {"judge_before": {**MEAN, "ci95": [1]}}}})
    )
    with pytest.raises(UserError, match=r"'objectives\.a\.judge_before\.ci95' must be two finite numbers"):
        write_report(run)


# ---- what listens ----


@pytest.mark.parametrize(
    "option",
    ["host=0.0.0.0", "hos=0.0.0.0", "HOST=::", "config=open.yaml", "conf=x", "hf-token=x", "hf_tok=x"],
)
def test_a_started_server_cannot_be_opened_to_the_network(option):
    with pytest.raises(UserError, match=r"engine\.options must not set (host|config|hf-token)"):
        parse(["--engine.kind", "vllm", "--engine.executable", "vllm", "--engine.options", option])


def test_a_server_of_another_machine_is_asked_for_by_name():
    with pytest.raises(UserError, match="allow_remote"):
        parse(["--engine.kind", "vllm", "--engine.url", "http://192.168.1.2:8000"])


# ---- what is installed ----


@pytest.mark.parametrize(
    ("printed", "said", "code"),
    [
        (
            {"dependencies": [{"name": "a", "version": "1", "vulns": []}]},
            "no known vulnerability in 1 packages",
            0,
        ),
        ({"dependencies": [{"name": "a", "skip_reason": "not found"}]}, "audit skipped: nothing is known", 0),
        (
            {
                "dependencies": [
                    {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
                ]
            },
            "audit: a 1: CVE-1, mended in 2",
            1,
        ),
        ("ConnectionError: host.example", "audit skipped: cannot reach the data of vulnerabilities", 0),
    ],
)
def test_the_audit_fails_where_something_is_known_and_says_where_it_could_not_look(printed, said, code):
    text = printed if isinstance(printed, str) else json.dumps(printed)
    found = audit((sys.executable, "-c", f"print({text!r})"))
    assert found[1] == code and said in found[0]
    assert "example" not in found[0]
