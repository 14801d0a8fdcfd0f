import pytest

from vllm_sparse import __version__, cli
from vllm_sparse.errors import FormatError


def test_without_a_command_it_lists_them_and_fails(capsys):
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_help_and_version_succeed(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.endswith(__version__ + "\n")


def test_unknown_command(capsys):
    assert cli.main(["comprss"]) == 2
    assert "vllm-sparse: error: unknown command 'comprss'" in capsys.readouterr().err


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_compress_does_not_spin_unless_asked_to(monkeypatch, before, after):
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
    seen = []
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: seen.append(cli.os.environ["OMP_WAIT_POLICY"]))
    with pytest.raises(AttributeError):  # what was imported here has no command
        cli.main(["compress"])
    assert seen == [after]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert f"vllm-sparse {name}" in capsys.readouterr().out


def fail(error):
    class Module:
        @staticmethod
        def add_arguments(parser):
            pass

        @staticmethod
        def run(args):
            raise error

    return lambda name: Module


def test_a_users_error_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib, "import_module", fail(FormatError("model.layers.0: truncated")))
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr().err == "vllm-sparse: error: model.layers.0: truncated\n"


def test_interruption_has_its_own_status(monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", fail(KeyboardInterrupt()))
    assert cli.main(["compress"]) == 130
