"""Files and names made to harm, or only broken: told by name, in a line, without running, hanging or escaping."""

from __future__ import annotations

import gzip
import html
import html.parser
import io
import json
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
from frameworks import require

from gapo import cli, data
from gapo.commands import study as study_command
from gapo.commands.train import parse
from gapo.data import text_files
from gapo.runs.errors import ConfigError
from gapo.runs.models.pretrained import load_model, load_tokenizer
from gapo.runs.output import plots
from gapo.runs.output.tensors import open_tensors
from gapo.runs.policy.policy import Policy
from gapo.runs.score import score_page as score_report
from gapo.runs.train import train_page as report
from gapo.study.markdown import render_markdown

GOOD = {"prompt": "Q? ", "chosen": "yes", "rejected": "no"}
LINE = json.dumps(GOOD).encode()
CSV = b"prompt,chosen,rejected\n"


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_the_pickle_of_these_tests_does_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


# Data


@pytest.mark.parametrize(
    ("name", "content", "rows", "problems"),
    [
        ("a.jsonl", b"\xef\xbb\xbf" + LINE, 1, []),
        ("a.json", b"\xef\xbb\xbf[" + LINE + b"]", 1, []),
        ("a.csv", b"\xef\xbb\xbf" + CSV + b"Q? ,yes,no\n", 1, []),
        ("a.jsonl", LINE + b"\r\n" + LINE + b"\r\n", 2, []),
        ("a.csv", b"prompt,chosen,rejected\r\nQ? ,yes,no\r\n", 1, []),
        ("a.jsonl", LINE + b'\n{"chosen": "\\ud800", "rejected": "x"}', 1, ["2: half a surrogate pair"]),
        ("a.jsonl", LINE + b'\n{"chosen": "a", "rejected": "x", "\\udfff": 1}', 1, ["2: half a surrogate pair"]),
        ("a.jsonl", LINE + b'\n{"chosen": "\\ud83d\\ude00", "rejected": "x"}', 2, []),
        ("a.jsonl", b"[" * 100_000 + b"\n" + LINE, 1, ["1: not valid JSON"]),
        ("a.jsonl", b'{"chosen": "a", "rejected": "b", "x": ' + b"[" * 900 + b"]" * 900 + b"}\n" + LINE, 1,
         ["1: nested more than 50 levels"]),
        ("a.jsonl", b'"not valid JSON"\n' + LINE, 1, ["1: not an object with columns, but str"]),
        ("a.jsonl", b'{"chosen": "a", "rejected": "b", "n": ' + b"9" * 5000 + b"}\n" + LINE, 1, ["1: not valid JSON"]),
        ("a.csv", CSV + b"Q? ,yes," + b"n" * 200_000 + b"\nQ? ,yes,no\n", 2, []),
        ("a.csv", CSV + b'Q? ,"yes"!,no\nQ? ,yes,no\n', 1, ["2: not valid CSV: "]),
        ("a.csv", CSV + b'Q? ,yes,no\nQ? ,"yes,no\nQ? ,yes,no\n', 1, ["3: not valid CSV: unexpected end of data"]),
        ("a.csv", CSV + b"Q? ,yes, of course,no\nQ? ,yes,no\n", 1, ["2: more cells than the first line names: quote"]),
        ("a.csv", b"chosen,rejected,prompt\nyes,no\nyes,no,Q\n", 1, ["2: fewer cells than the first line names"]),
        ("a.jsonl", LINE + b'\n{"chosen": "a", "rejected": "b", "chosen": "c"}', 1, ["2: column 'chosen' occurs t"]),
        ("a.csv", CSV + b"Q? ,yes,\xff\nQ? ,yes,n\xc3\xa9\n", 1, ["2: not UTF-8"]),
        # The name that a gzip file carries inside is not used.
        ("a.jsonl.gz", b"\x1f\x8b\x08\x08" + bytes(6) + b"../../b\0" + gzip.compress(LINE, mtime=0)[10:], 1, []),
    ],
)  # fmt: skip
def test_what_can_be_read_is(tmp_path: Path, name: str, content: bytes, rows: int, problems: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    found = data.read_pairs(tmp_path / name)
    assert len(found.rows) == rows
    assert set(found.rows[-1]) >= set(GOOD)
    assert len(found.problems) == len(problems)
    for problem, start in zip(found.problems, problems, strict=True):
        assert f"{problem.line}: {problem.reason}".startswith(start)
    data.write_rows(tmp_path / "again.jsonl", found.rows)
    assert data.read_pairs(tmp_path / "again.jsonl").rows == found.rows
    assert sorted(os.listdir(tmp_path)) == sorted([name, "again.jsonl"])


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", LINE.decode().encode("utf-16"), "a.jsonl is UTF-16: save it as UTF-8"),
        ("a.csv", b"prompt,chosen,chosen,rejected\na,b,c,d\n", "a.csv: column 'chosen' occurs twice in the first line"),
        ("a.csv", b'prompt,"chosen,rejected\na,b,c\n', "a.csv: the first line, .*, is not valid CSV"),
        ("a.parquet", b"", "a.parquet is not a whole Parquet file"),
        *((f"a{end}", b"", "no usable pair found") for end in (".json", ".csv", ".jsonl.gz")),
        ("a.jsonl.gz", gzip.compress(LINE, mtime=0)[:-4] + b"oops", "not a whole gzip file: Incorrect length"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.PairError, match=match):
        data.read_pairs(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.pkl", "a.npz", "a.pkl.gz"]
)
def test_a_pickle_by_any_name_is_not_read(tmp_path: Path, name: str) -> None:
    raw = pickle.dumps(Evil(tmp_path / "ran"), protocol=0 if name == "a.csv" else 4)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(data.PairError, match=name):
        data.read_pairs(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_inside_a_parquet_file_is_not_read(tmp_path: Path) -> None:
    """Old versions of Arrow unpickled the type of such a column."""
    import pyarrow as pa
    import pyarrow.parquet

    evil = {"ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": pickle.dumps(Evil(tmp_path / "ran"))}  # fmt: skip
    fields = [pa.field(name, pa.string(), metadata=evil) for name in GOOD]
    pyarrow.parquet.write_table(
        pa.table([[v] for v in GOOD.values()], schema=pa.schema(fields)), tmp_path / "a.parquet"
    )
    assert data.read_pairs(tmp_path / "a.parquet").rows == [GOOD]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["script.py", "train.pkl"])
def test_a_data_set_that_brings_code_is_refused(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "script"
    folder.mkdir()
    (folder / "script.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    (folder / "train.pkl").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for name in {"script.py", "train.pkl"} - {content}:
        (folder / name).unlink()
    with pytest.raises(data.PairError, match=r"is neither a file .* nor a data set that could be loaded"):
        data.read_pairs(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: path.mkdir(), "a.jsonl is a folder; give a file"),
        (lambda path: os.mkfifo(path), "a.jsonl is a device or a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "a.jsonl is a device or a pipe"),
        (lambda path: path.symlink_to(path), "a.jsonl is a link to nothing"),
        (lambda path: path.symlink_to("gone"), "a.jsonl is a link to nothing"),
        (lambda path: None, "a.jsonl does not exist"),
    ],
)
def test_what_is_no_plain_file(tmp_path: Path, make: Any, match: str) -> None:
    make(tmp_path / "a.jsonl")
    with pytest.raises(data.PairError, match=match):
        data.read_pairs(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["x" * 300 + ".jsonl", "x" * 5000, "/dev/zero", "a\0b.jsonl"])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(data.PairError, match=r"File name too long|is a device or a pipe|does not exist"):
        data.read_pairs(name)


def test_a_gzip_bomb_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "_HARMLESS", 1 << 20)
    packed = gzip.compress(LINE + b" " * (1 << 24))
    assert len(packed) * 500 < 1 << 24
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    with pytest.raises(data.PairError, match=r"a\.jsonl\.gz unpacks to more than 100 times its size.*without \.gz"):
        data.read_pairs(tmp_path / "a.jsonl.gz")
    monkeypatch.setattr(text_files, "_HARMLESS", 1 << 25)
    assert data.read_pairs(tmp_path / "a.jsonl.gz").rows == [GOOD]


def test_an_error_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["flip", "\x1b[2J\x07gone.jsonl", "--output", str(tmp_path / "a.jsonl")]) == 1
    assert r"gapo: error: pairs: \x1b[2J\x07gone.jsonl does not exist" in capsys.readouterr().err


def test_a_chat_template_that_refuses_is_told_by_roles() -> None:
    tokenizer = hf_models.tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    row = {name: [{"role": "user", "content": text}] for name, text in GOOD.items()}
    try:
        with pytest.raises(ValueError, match=r"chat template refuses messages of the roles user: roles must alternate"):
            data.tokenize_pair(row, tokenizer)
    finally:
        tokenizer.chat_template = None


# Configurations

BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 8)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize("command", [parse, study_command.parse], ids=["train", "study"])
@pytest.mark.parametrize(
    ("text", "match"),
    [
        (BOMB, r"a\.yaml has a YAML alias, \*a, which is not accepted: write the value out"),
        ("pairs: &a [*a]\n", "has a YAML alias"),
        ("pairs: " + "[" * 3000, r"a\.yaml is nested more than 20 levels deep"),
        ("seed: 1\nseed: 2\n", r"a\.yaml has the key 'seed' twice"),
        ("config: b.yaml\n", r"a\.yaml names another configuration"),
        ("# nothing\n", r"a\.yaml holds no `key: value` lines"),
        ("- seed\n", r"a\.yaml holds no `key: value` lines"),
        ("seed: 1\n---\nseed: 2\n", r"a\.yaml is not accepted as YAML: expected a single document"),
        ("pairs: a\0b\n", r"a\.yaml is not accepted as YAML: .*special characters are not allowed"),
        ("seed: " + "9" * 5000 + "\n", r"a\.yaml is not accepted as YAML: Exceeds the limit"),
        ("pairs: null\n", "pairs must not be null"),
        ("warmup_ratio: .nan\n", "warmup_ratio must be finite, got nan"),
        ("tiny_learning_rate: -.inf\n", "tiny_learning_rate must be finite, got -inf"),
        ("pairs: \ud800\n", r"a\.yaml is not UTF-8"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, command: Any, text: str, match: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    began = time.process_time()
    for arguments in ([str(path)], ["--seed", "3", f"--config={path}"], ["--config", str(path)]):
        with pytest.raises(ConfigError, match=match) as raised:
            command(arguments)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 600
    assert time.process_time() - began < 5


@pytest.mark.parametrize("command", [parse, study_command.parse], ids=["train", "study"])
@pytest.mark.parametrize("tag", ["apply:os.mkdir [{}]", "object/apply:os.mkdir [{}]", "object/new:os.mkdir [{}]"])
def test_no_tag_runs_code(tmp_path: Path, command: Any, tag: str) -> None:
    (tmp_path / "a.yaml").write_text(f"pairs: !!python/{tag.format(tmp_path / 'ran')}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml is not accepted as YAML: could not determine a constructor"):
        command([str(tmp_path / "a.yaml")])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["/dev/zero", "gone.yaml", "", "x" * 5000, "a\0b"])
def test_what_is_no_configuration_file(name: str) -> None:
    for arguments in ([name], ["--config", name]):
        with pytest.raises(ConfigError, match=re.escape(f"there is no configuration file {name!r}"[:99])):
            parse(arguments)


def test_a_line_of_nothing_is_the_defaults_and_a_deep_value_is_told() -> None:
    assert parse([])[0].pairs == "demo"
    with pytest.raises(ConfigError, match=r"loss_settings|nested too deeply"):
        parse(["--loss_settings", "[" * 3000 + "]" * 3000])


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfseed: 7\r\n")
    assert parse([str(tmp_path / "a.yaml")])[0].seed == 7


# Models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer, which the tests only read."""
    folder = tmp_path_factory.mktemp("model") / "model"
    hf_models.make("llama").save_pretrained(folder)
    hf_models.tokenizer().save_pretrained(folder)
    return folder


def pickled(model: Path, folder: Path, name: str = "pytorch_model.bin") -> Path:
    """A copy of `model` whose weights are a pickle that leaves `folder`/ran."""
    copy = folder / "pickled"
    shutil.copytree(model, copy)
    (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(pickle.dumps(Evil(folder / "ran")))
    return copy


def test_weights_that_are_a_pickle_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pickled(model, tmp_path)
    data.write_rows(tmp_path / "pairs.jsonl", data.generate_pairs(20))
    commands = [
        ["score", str(tmp_path / "pairs.jsonl"), "--model", str(folder), "--output", str(tmp_path / "s.jsonl")],
        ["train", "--pairs", str(tmp_path / "pairs.jsonl"), "--eval_fraction", "0.5", "--model", str(folder),
         "--output_dir", str(tmp_path / "run")],
    ]  # fmt: skip
    for command in commands:
        assert cli.main(command) == 1
        assert "pickled has its weights in pytorch_model.bin, a pickle, which may run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "s.jsonl").exists()


def test_a_trainer_that_loads_by_name_takes_safetensors_unless_told(model: Path, tmp_path: Path) -> None:
    import torch

    from gapo.adapters.hf import GAPOConfig, GAPOTrainer

    folder = pickled(model, tmp_path)
    rows = data.generate_pairs(4)

    def trainer(**options: Any) -> GAPOTrainer:
        args = GAPOConfig(str(tmp_path / "run"), report_to="none", **options)
        return GAPOTrainer(str(folder), args=args, train_dataset=rows)

    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        trainer()
    assert not (tmp_path / "ran").exists()
    torch.save(hf_models.make("llama").state_dict(), folder / "pytorch_model.bin")
    assert trainer(model_init_kwargs={"use_safetensors": False}).model.config.hidden_size == 32


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_that_is_a_pickle_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    lora = hf_models.lora("llama")
    lora.peft_config["default"].base_model_name_or_path = str(model)
    lora.save_pretrained(adapter)
    assert load_model(str(model), adapter=str(adapter), dtype="float32")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for options in ({"name": str(model), "adapter": str(adapter)}, {"name": str(adapter), "tokenizer": str(model)}):
        with pytest.raises(ConfigError, match=r"adapter has its weights in adapter_model\.bin, a pickle"):
            load_model(**options, dtype="float32")
    assert not (tmp_path / "ran").exists()


def with_code(model: Path, folder: Path) -> Path:
    """A copy of `model` that says that classes of its own, which leave `folder`/ran, are needed to load it."""
    copy = folder / "coded"
    shutil.copytree(model, copy)
    (copy / "evil.py").write_text(f"import os; os.mkdir({str(folder / 'ran')!r})\n")
    for name, extra in {
        "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
                        "model_file": "evil.py"},
        "tokenizer_config.json": {"tokenizer_class": "C", "auto_map": {"AutoTokenizer": ["evil.C", None]}},
    }.items():  # fmt: skip
        path = copy / name
        path.write_text(json.dumps(json.loads(path.read_text()) | extra))
    return copy


def test_code_that_comes_with_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    require("mlx_lm")
    from gapo.runs.train import train_mlx
    from gapo.runs.train.train_config import TrainConfig

    folder = with_code(model, tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer '.*coded' .*contains custom code"):
        load_tokenizer(str(folder))
    with pytest.raises(ConfigError, match=r"model '.*coded' .*contains custom code"):
        load_model(str(folder), tokenizer=str(model), dtype="float32")
    with pytest.raises(ConfigError, match="could not be loaded by mlx-lm"):
        train_mlx.MlxTrainee(TrainConfig(), parse([])[1], str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_model_is_told_by_name(model: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    with pytest.raises(ConfigError, match=r"'.*damaged' is not what save_pretrained leaves"):
        load_model(str(folder), dtype="float32")


# What a run kept for itself, exchanged for a pickle


def test_a_checkpoint_that_holds_a_pickle_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_rows(tmp_path / "pairs.jsonl", data.generate_pairs(20))
    run = tmp_path / "run"
    settings = {"pairs": tmp_path / "pairs.jsonl", "model": model, "eval_fraction": 0.5, "max_steps": 3,
                "eval_steps": 1, "batch_size": 2, "max_length": 64, "output_dir": run}  # fmt: skip
    command = ["train", *(text for k, v in settings.items() for text in (f"--{k}", str(v)))]
    assert cli.main(command) == 0
    shutil.rmtree(run / "checkpoints" / "checkpoint-3")
    last = run / "checkpoints" / "checkpoint-2"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (run / "summary.json").unlink(missing_ok=True)
        kept = (last / name).read_bytes()
        (last / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran"), protocol=2))  # the one that PyTorch writes
        assert cli.main(command) == 1
        assert "checkpoint-2 holds a file that is no checkpoint, and might have run code" in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()
        (last / name).write_bytes(kept)
    assert cli.main(command) == 0


def test_kept_arrays_that_are_a_pickle_are_refused(model: Path, tmp_path: Path) -> None:
    policy = Policy(model, cache=tmp_path)
    policy.prepare({"all": policy.tokenized(data.generate_pairs(2), 64)})
    (path,) = tmp_path.glob("*/reference-*.safetensors")
    evil = np.array([Evil(tmp_path / "ran")], dtype=object)
    archive = io.BytesIO()
    np.savez(archive, test=evil)
    raw = io.BytesIO()
    np.save(raw, evil)
    numbers = io.BytesIO()
    np.save(numbers, np.ones(3))
    evils = [archive.getvalue(), pickle.dumps(Evil(tmp_path / "ran")), raw.getvalue()]
    for content in (*evils, numbers.getvalue(), b"", b"PK\x05\x06broken", b"PK\x03\x04broken"):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"reference-.*\.safetensors is damaged .*: remove it, and they are"):
            policy.prepare({"all": policy.tokenized(data.generate_pairs(2), 64)})
    assert not (tmp_path / "ran").exists()


def test_kept_tensors_that_are_damaged_are_told_by_name(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    for content in (b"", pickle.dumps(Evil(tmp_path / "ran")), b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"state\.safetensors is damaged .*: remove it"), open_tensors(path):
            pass
    assert not (tmp_path / "ran").exists()


# Names and texts in pages and files

EVIL = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</pre></td></title></style><script>",
    "<!--",
    "{{ 1234567 * 7 }}{% raw %}",
    "$\\frac{$ a$b_{$ \\u202e",
)


class Tags(html.parser.HTMLParser):
    """The tags of a page, and those attributes that run or load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags += [tag, *(name for name, _ in attributes if name.startswith("on") or name in ("src", "action"))]

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")


def test_pages_hold_what_users_gave_as_text(tmp_path: Path) -> None:
    given = " ".join(EVIL)
    evil = [train_page(tmp_path / given.replace("/", "_"), given), score_page(given)]
    plain = [train_page(tmp_path / "plain", "plain"), score_page("plain")]
    for one, other in zip(evil, plain, strict=True):
        assert Tags(one).tags == Tags(other).tags
        assert str(1234567 * 7) not in one  # no expression was worked out
        assert one.count(html.escape("<script>alert(1)</script>")) >= 5


def train_page(folder: Path, given: str) -> str:
    """The page of a run with drift, with this text for whatever a user can give."""
    folder.mkdir(parents=True)
    drift = {f"drift/{name}": 0.5 for name in ("kl", "held_out_margin", "train_margin", "held_out_chosen_logps",
                                               "response_length", "response_ended")}  # fmt: skip
    measures = dict.fromkeys(report._MEASURES, 0.5)
    steps = {"margins": [0.1] * 8, "anchor_gaps": [0.1] * 8, "weights": [1.0] * 8, "is_flipped": [0, 1] * 4}
    rows = [{"step": step, **measures, **drift} for step in (0, 1)]
    for name, lines in (("metrics.jsonl", rows), ("steps.jsonl", [{"step": 1, **steps}])):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data.txt").write_text(given)
    (folder / "config.json").write_text(json.dumps({given: given, "pairs": [given]}))
    summary = {"loss": given, "needs_anchor": True, "train_pairs": 8, "flipped": 4, "held_out_pairs": 8,
               "seconds": 1.0, "before": measures, "after": measures, "versions": {given: given}}  # fmt: skip
    return report.render(folder, summary)


def score_page(given: str) -> str:
    """The page of scores under two models of such names."""
    pairs = [
        {**row, "prompt": given, "chosen": given, "rejected": given, "id": given} for row in data.generate_pairs(6)
    ]
    scores = [{"row": i, "checkpoint": name, "margin": 0.1 * i, "gap": 0.1 * i, "weight": 1.0}
              for name in (given, given + "2") for i in range(6)]  # fmt: skip
    settings = {"pairs": given, "models": [given, given + "2"], "repeats": 1, "batch_size": 6, "rho": 0.1,
                "adaptive": True, "anchor": given, "first_order_ratio": None, "versions": {given: given}}  # fmt: skip
    return score_report.render(pairs, scores, settings, given)


@pytest.mark.pictures
def test_a_picture_holds_names_as_text() -> None:
    name = '"><script>a</script> $x_{$'
    svg = plots.figure(name, name, name, lambda axes: axes.plot([name, "b"], [1, 2], label=name))
    assert "<script" not in svg
    assert svg.count("$x_{$") >= 4


def test_tables_in_markdown_hold_names_as_text() -> None:
    known = {"data": "<script>a.jsonl", "parameters": 1, "trained": 1, "before": {"accuracy": 0.5},
             "seconds": 1, "cores": 1, "commit": None, "versions": {"gapo": "0", "python": "3"}}  # fmt: skip
    table: dict[str, Any] = {"head": ["a|b"], "rows": [], "title": "t", "what": "w"}
    found = {"config": {"train_pairs": 1, "epochs": 1, "batch_size": 1, "seeds": 1}, "facts": known, "left_out": [],
             "runs": 1, "failed": 0, "cpu_seconds": 1, "accuracy": [table], "diagnostics": table, "diagnosed_at": "x",
             "logps": table, "curves": [], "valuation": None, "settings": table,
             "asides": table, "noisy_choice": None, "verdict": "v"}  # fmt: skip
    text = render_markdown(found)
    assert "- &lt;script>a.jsonl" in text.replace("&gt;", ">")
    assert "<script" not in text
    assert "a\\|b" in text


def test_names_of_models_lead_to_no_other_files(model: Path, tmp_path: Path) -> None:
    """Scores name their models; what is written is named by --output alone."""
    inner = tmp_path / "in" / "<b>$x_{$"
    inner.parent.mkdir()
    shutil.copytree(model, inner)
    data.write_rows(tmp_path / "pairs.jsonl", data.generate_pairs(6))
    names = [f"{inner}/../{inner.name}", str(inner)]
    before = sorted(tmp_path.rglob("*"))
    command = ["score", str(tmp_path / "pairs.jsonl"), "--model", *names, "--max_length", "64"]
    assert cli.main([*command, "--output", str(tmp_path / "out" / "s.jsonl")]) == 0
    new = {str(path.relative_to(tmp_path)) for path in set(tmp_path.rglob("*")) - set(before)}
    assert new == {"out", *(f"out/s.jsonl{ending}" for ending in ("", ".json", ".html"))}
    assert "&lt;b&gt;$x_{$" in (tmp_path / "out" / "s.jsonl.html").read_text()
