"""Presets and networks: every preset builds and runs with whatever is missing; a mistake in a preset is named."""

from __future__ import annotations

import itertools

import pytest
import torch
from vacli import VacliError
from vacli.temporal.model import Network, Preset, check_preset, load_preset, preset_names, preset_text

DIMS = {"mae": 6, "logmel": 4}


def combinations(head: str) -> list[list[str]]:
    streams = load_preset(head).streams
    return [list(c) for n in range(1, len(streams) + 1) for c in itertools.combinations(streams, n)]


EVERY = [(head, streams) for head in preset_names() for streams in combinations(head)]


def inputs(streams: list[str], B: int, L: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random rows; about a third of them not seen, by each stream for itself."""
    torch.manual_seed(B + 10 * L)
    seen = {name: torch.rand(B, L) < 0.7 for name in streams}
    return {name: torch.randn(B, L, DIMS[name]) * seen[name][..., None] for name in streams}, seen


def network(head: str, streams: list[str], changes: dict[str, str] | None = None) -> Network:
    torch.manual_seed(0)
    net = Network(load_preset(head, changes, streams), {name: DIMS[name] for name in streams})
    for absent in net.absent:
        torch.nn.init.normal_(absent)  # as if trained: a missing stream is told from zeros
    return net


def check_step(net: Network, streams: dict[str, torch.Tensor], seen: dict[str, torch.Tensor]) -> None:
    out = net(streams, seen)["va"]
    assert out.shape == (*next(iter(seen.values())).shape, 2)
    assert out.isfinite().all()
    net.zero_grad()
    out.square().sum().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize(("head", "streams"), EVERY)
def test_a_preset_runs_forward_and_backward_with_whatever_is_missing(head, streams):
    net = network(head, streams)
    for B, L in ((2, 7), (1, 1)):
        check_step(net, *inputs(streams, B, L))
    rows, seen = inputs(streams, 2, 7)
    for name in streams:
        check_step(net, {n: x for n, x in rows.items() if n != name}, seen)  # a whole stream is not given
        check_step(net, rows, {**seen, name: torch.zeros(2, 7, dtype=torch.bool)})  # or saw nothing
    check_step(net, rows, {name: torch.zeros(2, 7, dtype=torch.bool) for name in streams})


@pytest.mark.parametrize(("head", "streams"), EVERY)
def test_what_stands_in_rows_that_were_not_seen_changes_nothing(head, streams):
    net = network(head, streams).eval()
    rows, seen = inputs(streams, 2, 9)
    outputs, gradients = [], []
    for junk in (0.0, float("nan"), float("inf"), 1e6):
        given = {name: x.masked_fill(~seen[name][..., None], junk) for name, x in rows.items()}
        net.zero_grad()
        out = net(given, seen)["va"]
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    for out, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.equal(out, outputs[0])
        assert torch.equal(gradient, gradients[0])


@pytest.mark.parametrize(("head", "streams"), EVERY)
def test_a_stream_not_given_is_one_that_saw_nothing(head, streams):
    net = network(head, streams).eval()
    rows, seen = inputs(streams, 2, 9)
    nothing = torch.zeros(2, 9, dtype=torch.bool)
    for name in streams:
        without = {n: x for n, x in rows.items() if n != name}
        given = net(without, {**seen, name: nothing})["va"]
        assert torch.equal(given, net(rows, {**seen, name: nothing})["va"])


def test_mamba_does_not_look_ahead():
    net = network("mamba", ["mae", "logmel"]).eval()
    rows, seen = inputs(["mae", "logmel"], 2, 30)
    before = net(rows, seen)["va"]
    for t in (0, 11, 28):
        later = {name: x.clone() for name, x in rows.items()}
        unseen = {name: s.clone() for name, s in seen.items()}
        for name in rows:
            later[name][:, t + 1 :] += 5
            unseen[name][:, t + 1 :] ^= True
        after = net(later, unseen)["va"]
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-6, rtol=0)
        assert not torch.allclose(after[:, t + 1 :], before[:, t + 1 :])


def test_mamba_with_mae_alone_has_3_8_million_parameters():
    net = Network(load_preset("mamba", streams=["mae"]), {"mae": 1024})
    assert (
        sum(p.numel() for p in net.parameters()) == 3_774_350
    )  # 2.63 M of them in the TCN, 0.85 M in Mamba, 0.26 M in the projection


def test_standardising_takes_the_moments_it_is_given():
    net = network("linear", ["mae", "logmel"]).eval()
    rows, seen = inputs(["mae", "logmel"], 2, 5)
    plain = net(rows, seen)["va"]
    moments = {name: (torch.full((DIMS[name],), 3.0), torch.full((DIMS[name],), 2.0)) for name in rows}
    net.standardise_by(moments)
    torch.testing.assert_close(net({name: 2 * x + 3 for name, x in rows.items()}, seen)["va"], plain)
    raw = network("linear", ["mae", "logmel"], {"encode.*.standardise": "false"}).eval()
    raw.standardise_by(moments)
    torch.testing.assert_close(raw(rows, seen)["va"], plain)


def test_any_track_name_can_be_a_stream():
    names = [
        "mae@0123abcd",
        "mae-tuned",
        "audio.v2",
        "half",
        "type",
    ]  # the last two are words of torch.nn.Module
    net = Network(load_preset("linear", streams=names), dict.fromkeys(names, 3))
    seen = {name: torch.ones(1, 2, dtype=torch.bool) for name in names}
    assert net({name: torch.ones(1, 2, 3) for name in names}, seen)["va"].shape == (1, 2, 2)


def test_a_stream_chosen_by_digits_is_encoded_as_its_plain_name_says():
    changes = {"encode.mae.blocks": "[{linear = {dim = 5}}]"}
    net = Network(load_preset("linear", changes, ["mae@01", "logmel"]), {"mae@01": 3, "logmel": 4})
    assert [encoder.dim for encoder in net.encode] == [5, 4]


# ---- presets -------------------------------------------------------------------------------------------------


def refusal(
    head: str = "mamba", changes: dict[str, str] | None = None, streams: list[str] | None = None
) -> str:
    with pytest.raises(VacliError) as e:
        load_preset(head, changes, streams)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("head", preset_names())
def test_a_preset_says_where_it_comes_from_and_survives_its_own_dump(head):
    preset = load_preset(head)
    assert preset.name == head
    assert preset.source
    assert preset_text(head).startswith("#")
    assert check_preset(preset.model_dump(), "the dump") == preset


def test_a_key_is_changed_from_outside_at_any_depth():
    preset = load_preset(
        "mamba",
        {
            "train.epochs": "7",
            "train.lr": "1e-2",
            "fuse": "concat",
            "encode.*.standardise": "false",
            "encode.logmel.blocks": "[{linear = {dim = 12}}, {norm = {}}]",
            "decode": "[]",
            "streams": '["logmel"]',
        },
    )
    assert (preset.train.epochs, preset.train.lr, preset.fuse) == (7, 0.01, "concat")
    assert not preset.encode["*"].standardise
    assert preset.encode["logmel"].blocks == [{"linear": {"dim": 12}}, {"norm": {}}]
    assert (preset.decode, preset.streams) == ([], ["logmel"])
    assert preset.train.patience == load_preset("mamba").train.patience


MISTAKES = {
    "train.epoch = 3": ("unknown key train.epoch", "epochs, batch, lr"),
    "epochs = 3": ("unknown key epochs", "streams, encode"),
    "encode.*.block = []": ("unknown key encode.*.block", "standardise, blocks"),
    "tasks.va.dim = 3": ("unknown key tasks.va.dim", "hidden"),
    "tasks.au.hidden = 3": ("tasks.au", "'va'"),
    "tasks = {}": ("tasks", "at least 1"),
    "windows.hop = 3": ("unknown key windows.hop", "length, stride"),
    "train.epochs = many": ("train.epochs", "integer", "'many'"),
    "train.epochs = 3.5": ("train.epochs", "integer", "'3.5'"),
    'train.epochs = "3"': ("train.epochs", "integer", "'3'"),
    "train.epochs = 0": ("train.epochs", "greater than or equal to 1", "'0'"),
    "train.lr = inf": ("train.lr", "finite", "'inf'"),
    "train.lr = true": ("train.lr", "number", "'True'"),
    "windows.stride = 1001": ("stride 1001", "length 1000"),
    "fuse = add": ("fuse", "'sum' or 'concat'", "'add'"),
    "streams = []": ("streams", "at least 1"),
    'streams = ["mae", "mae"]': ("streams", "twice", "mae, mae"),
    "encode.maee.standardise = false": ("encode.maee", "mae, logmel"),
    "decode = [{tcm = {}}]": ("decode", "unknown block 'tcm'", "linear, norm, tcn, mamba"),
    "decode = [{linear = {dims = 3}}]": ("decode", "block linear", "dims"),
    "decode = [{linear = {dim = 3, bias = true}}]": ("decode", "block linear", "unknown key bias", "dim"),
    "decode = [{norm = {dim = 3}}]": ("decode", "block norm", "unknown key dim", "none"),
    "decode = [{linear = {}}]": ("decode", "block linear", "dim", "required"),
    'decode = [{linear = {dim = "wide"}}]': ("decode", "block linear", "dim", "'wide'"),
    "decode = [{linear = {dim = 0}}]": ("decode", "block linear", "dim", "'0'"),
    "decode = [{linear = {dim = -4}}]": ("decode", "block linear", "dim", "'-4'"),
    "decode = [{tcn = {channels = [], width = 3, dropout = 0.1}}]": ("block tcn", "channels", "at least 1"),
    "decode = [{tcn = {channels = [4, 2.5], width = 3, dropout = 0}}]": ("block tcn", "channels.1", "'2.5'"),
    "decode = [{linear = {dim = 3}, norm = {}}]": ("decode", "one name with its options"),
    "decode.0.tcn = {}": ("decode is no table",),
    "name = My Head": ("name", "'My Head'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_preset_is_one_line_that_names_it(mistake):
    key, _, value = mistake.partition(" = ")
    told = refusal(changes={key: value})
    for part in MISTAKES[mistake]:
        assert part in told


def test_an_unknown_head_lists_the_known_ones():
    told = refusal("manba")
    assert "'manba'" in told
    for name in preset_names():
        assert name in told


def test_a_preset_file_that_is_missing_or_no_toml_or_no_text_is_one_line(tmp_path):
    (tmp_path / "bad.toml").write_text("name = \n")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    for file, part in (("absent.toml", "No such file"), ("bad.toml", "line 1"), ("bytes.toml", "decode")):
        told = refusal(str(tmp_path / file))
        assert file in told
        assert part in told


def test_a_file_of_ones_own_is_a_head(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('name = "mine"\nstreams = ["mae"]\n')
    assert load_preset(str(mine), {"train.epochs": "2"}) == Preset(
        name="mine", streams=["mae"], train=load_preset(str(mine)).train.model_copy(update={"epochs": 2})
    )


def test_streams_of_unlike_widths_cannot_be_summed():
    preset = load_preset("linear", {"fuse": "sum"})
    with pytest.raises(VacliError, match=r"one width.*'mae': 6, 'logmel': 4.*concat"):
        Network(preset, DIMS)


def test_a_dropout_beyond_one_is_refused():
    block = "[{tcn = {channels = [4], width = 3, dropout = 2.0}}]"
    with pytest.raises(VacliError, match=r"block tcn .*dropout.*2\.0"):
        Network(load_preset("mamba", {"decode": block}), DIMS)
