"""--config: flags from files are checked like those of the command line; errors name file, line and key."""

import pytest

from training.flags.config import config_words
from training.flags.parser import build_parser, parse_args

DATA = ["--train-data", "d.tar"]


@pytest.fixture
def file(tmp_path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_later_files_win_over_earlier_ones_and_flags_over_files(file):
    first = file("a.yaml", "lr: 1e-3\nwd: 0.1\nlock-image: true\nlock_text: on\nepochs: 3  # published\n")
    second = file("b.yaml", "wd: 0.3\nlock-text: false\n")
    args = parse_args(["--epochs", "5", "--config", first, second, *DATA])
    assert (args.lr, args.wd, args.epochs) == (1e-3, 0.3, 5)
    assert args.lock_image and not args.lock_text
    assert not parse_args([*DATA, "--no-lock-image", "--config", first]).lock_image
    assert vars(parse_args([*DATA, "--config", first, "--config", second, "--epochs=5"])) == vars(args)


def test_values_of_every_kind(file):
    path = file(
        "a.yaml",
        "aug-cfg: {scale: '0.4,1.0', color_jitter: 0.2}\ntorchcompile: true\ngather-with-grad: false\n"
        "long-caption-keys: [a, b]\ntrain-num-samples: 4e2\nreport-to: tensorboard\ncsv-separator: ';'\n",
    )
    args = parse_args(["--train-data", "t.csv", "--config", path])
    assert args.aug_cfg == ["scale=0.4,1.0", "color_jitter=0.2"] and args.torchcompile == "model"
    assert args.gather_with_grad is False and args.long_caption_keys == ("a", "b")
    assert args.train_num_samples == 400 and args.report_to == ("tensorboard",) and args.csv_separator == ";"


def test_a_key_without_a_value_gives_the_default_again(file):
    base = file("base.yaml", "lr: 1e-3\nshort-image-components: 32\nlock-image: true\n")
    path = file("own.yaml", f"config: {base}\nshort-image-components:  # whole images\nlock-image: null\n")
    args = parse_args([*DATA, "--config", path])
    assert (args.lr, args.short_image_components, args.lock_image) == (1e-3, None, False)


def test_a_file_includes_others_beside_it(file, tmp_path, monkeypatch):
    file("base.yaml", "lr: 1e-3\nwd: 0.1\n")
    path = file("own.yaml", "wd: 0.4\nconfig: base.yaml\n")
    monkeypatch.chdir("/")
    args = parse_args([*DATA, "--config", path])
    assert (args.lr, args.wd) == (1e-3, 0.4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1e-3\nlearning-rate: 3\n", "line 2: learning-rate: unknown flag"),
        ("\nlr: fast\n", "line 2: lr: argument --lr: invalid float value: 'fast'"),
        ("lr-scheduler: linear\n", "line 1: lr-scheduler: argument --lr-scheduler: invalid choice"),
        ("lock-image: maybe\n", "line 1: lock-image: expected true or false"),
        ("wd: 0.1\nwd: 0.2\n", "line 2: wd: given twice"),
        ("help: true\n", "line 1: help: unknown flag"),
        ("aug-cfg: [[1]]\n", "line 1: aug-cfg: expected a value"),
        ("- lr\n", "expected lines of the form FLAG: VALUE"),
        ("lr: [1\n", "line"),
        ("config: a.yaml\n", "includes itself"),
        ("config: none.yaml\n", "No such file"),
    ],
)
def test_errors_name_file_line_and_key(text, said, file, capsys):
    path = file("a.yaml", text)
    with pytest.raises(SystemExit) as stop:
        parse_args([*DATA, "--config", path])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and said in message and message.count("error:") == 1
    assert (path if "none.yaml" not in text else "none.yaml") in message


def test_print_config_is_such_a_file(file, capsys):
    argv = [*DATA, "--lock-image", "--no-gather-with-grad", "--aug-cfg", "scale=0.4,1.0", "--csv-separator", "\t"]
    argv += ["--share4v-val-num", "5,6", "--lr", "1e-3", "--name", "a: b #c", "--torchcompile"]
    with pytest.raises(SystemExit) as stop:
        parse_args([*argv, "--print-config"])
    assert stop.value.code == 0
    printed = file("printed.yaml", capsys.readouterr().out)
    parser = build_parser()
    read = parser.parse_args(config_words([printed], parser.actions, parser.parse_args))
    assert vars(read) == vars(parser.parse_args(argv))
