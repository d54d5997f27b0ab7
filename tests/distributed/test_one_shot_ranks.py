"""st.score and st.prune on several ranks: what one process finds that sees the batches of all."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_runs import NETS, full, on_ranks, shard, train
from runs import batch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import sparsetrain as st
from sparsetrain import scores

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed")

BATCHES = 3


def steep(outputs: Tensor, targets: Tensor) -> Tensor:
    return 1e4 * F.cross_entropy(outputs, targets)


#: Arguments of st.prune that work on shards, too.
ANYWHERE: dict[str, dict[str, Any]] = {
    "magnitude": {"score": "magnitude", "sparsity": 0.7},
    "magnitude global": {"score": "magnitude", "sparsity": 0.9, "scope": "global"},
    "magnitude allocated": {
        "score": "magnitude",
        "sparsity": 0.8,
        "allocation": "erdos_renyi_kernel",
    },
    "magnitude 2:4": {"score": "magnitude", "structure": "2:4", "match": "hidden"},
    "random": {"score": "random", "sparsity": 0.5, "seed": 4},
    "gradient": {"score": "gradient", "sparsity": 0.7},
    "snip": {"score": "snip", "sparsity": 0.9},
    "taylor": {"score": "taylor", "sparsity": 0.6, "scope": "global"},
    "taylor squared": {"score": scores.Taylor(squared=True), "sparsity": 0.6},
    "taylor blocks": {"score": "taylor", "sparsity": 0.6, "blocks": ["conv", "hidden", "head"]},
    # As many go as are 0 already: not one that is less than another rank's smallest.
    "movement": {"score": "movement", "sparsity": 10 / 512, "match": "hidden", "loss_fn": steep},
    "wanda": {"score": "wanda", "sparsity": 0.5},
    "wanda layer": {"score": "wanda", "sparsity": 0.6, "scope": "layer"},
    "wanda 2:4": {"score": "wanda", "structure": "2:4", "match": "hidden"},
    "wanda blocks": {"score": "wanda", "sparsity": 0.6, "blocks": ["conv", "hidden", "head"]},
}
#: Those that need whole weights.
WHOLE: dict[str, dict[str, Any]] = {
    "fisher": {"score": "fisher", "sparsity": 0.6},
    "taylor sample": {"score": scores.Taylor(per="sample"), "sparsity": 0.6},
    "taylor sample squared": {
        "score": scores.Taylor(per="sample", squared=True),
        "sparsity": 0.6,
    },
    "brain damage": {"score": "optimal_brain_damage", "sparsity": 0.6},
    "grasp": {"score": "grasp", "sparsity": 0.6},
    "brain surgeon": {"score": scores.OptimalBrainSurgeon(block=8), "sparsity": 0.6},
    "brain surgeon batch": {
        "score": scores.OptimalBrainSurgeon(block=8, gradients="batch"),
        "sparsity": 0.6,
    },
    "synflow": {"score": scores.SynFlow(rounds=4), "sparsity": 0.8},
}
CHANNELS = ("activation_magnitude", "activation_variance", "batch_norm_scale")
CHANNELS_OF_WHOLE = ("gate_fisher",)
#: Whose numbers are compared, too.
SCORED = {f"score of {name}": name for name in ("gradient", "snip", "taylor", "wanda")}
NUMBERS = (*SCORED, *CHANNELS, *CHANNELS_OF_WHOLE)


def cut(rank: int, ranks: int, sizes: tuple[int, ...] = ()) -> list[tuple[Tensor, Tensor]]:
    """A rank's slices of the batches, equally long unless their sizes are given."""
    found = []
    for step in range(BATCHES):
        x, y = batch(step)
        lengths = sizes or (len(x) // ranks,) * ranks
        found.append((x.double().split(lengths)[rank], y.split(lengths)[rank]))
    return found


def network(net: str) -> nn.Module:
    """With some zeros already, which stay."""
    model = NETS[net]().double().eval()
    with torch.no_grad():
        model.hidden.weight[:5, 3] = 0.0
        model.hidden.weight[-5:, 3] = 0.0
        model.hidden.weight[-6:] *= 4.0
    return model


def prune(model: nn.Module, name: str, batches: Any) -> st.PruneResult:
    case = dict((ANYWHERE | WHOLE)[name])
    kind = scores.Score.build(case["score"])
    data = {"calibration": batches, "loss_fn": F.cross_entropy} if kind.data != "none" else {}
    return st.prune(model, case.pop("score"), case.pop("sparsity", None), **data | case)


def outcome(model: nn.Module, names: list[str], rank: int, ranks: int) -> dict[str, Any]:
    """Masks, counts and scores of channels; the model stays as it is."""
    batches = cut(rank, ranks)
    plain = model.module if hasattr(model, "module") else model
    loss = F.cross_entropy(model(batches[0][0]), batches[0][1])
    loss.backward()
    before = full(dict(plain.named_parameters()))
    grads = {n: p.grad for n, p in plain.named_parameters()}
    found: dict[str, Any] = {}
    for name in names:
        if name in NUMBERS:
            given = () if name == "batch_norm_scale" else (batches, F.cross_entropy)
            match = "conv" if name == "batch_norm_scale" else None
            found[name] = full(st.score(model, SCORED.get(name, name), *given, match=match))
            continue
        result = prune(model, name, batches)
        found[name] = (full(result.masks), result.sparsity, result.to_dict())
    after = full(dict(plain.named_parameters()))
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.requires_grad and p.grad is grads[n] for n, p in plain.named_parameters())
    return found


def hold_and_train(model: nn.Module, rank: int, ranks: int) -> dict[str, Any]:
    """Masks and weights after some steps behind the masks of a score."""
    result = prune(model, "snip", cut(rank, ranks))
    optimizer = result.hold(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    train(model, optimizer, range(3), rank, ranks)
    plain = model.module if hasattr(model, "module") else model
    return {"masks": full(optimizer.masks()), "weights": full(dict(plain.named_parameters()))}


def outermost(rank: int, ranks: int) -> dict[str, Tensor]:
    """Applied masks of a model that is one unit, whose weights a forward pass leaves whole."""
    model = fully_shard(network("even"))
    with torch.no_grad():
        model(cut(rank, ranks)[0][0])
    result = prune(model, "wanda", cut(rank, ranks))
    with torch.no_grad():
        model(cut(rank, ranks)[0][0])
    result.apply()
    model(cut(rank, ranks)[0][0]).sum().backward()
    return full(dict(model.named_parameters()))


def applied(name: str) -> dict[str, Tensor]:
    return dict(prune(network("even"), name, cut(0, 1)).apply().named_parameters())


def message(attempt: Any) -> str:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "no error"


def refusals(rank: int, ranks: int) -> dict[str, str]:
    model = shard(network("even"))
    batches = cut(rank, ranks)
    found = {name: message(lambda name=name: prune(model, name, batches)) for name in WHOLE}
    for name in CHANNELS_OF_WHOLE:
        found[name] = message(lambda name=name: st.score(model, name, batches, F.cross_entropy))
    found["target"] = message(lambda: st.prune(model, "magnitude", target=st.CompressionRate(4.0)))
    fewer = batches[rank:]
    found["batches"] = message(lambda: prune(model, "gradient", fewer))
    found["batches of ddp"] = message(
        lambda: prune(DistributedDataParallel(network("even")), "taylor", fewer)
    )
    with torch.no_grad():
        if rank == 1:
            model.hidden.weight.to_local()[0, 0] = torch.nan
    found["nan"] = message(lambda: prune(model, "magnitude", None))
    return found


def on_two(rank: int) -> dict[str, Any]:
    ddp, fsdp = DistributedDataParallel(network("even")), shard(network("even"))
    slices = cut(rank, 2, (3, 5))
    return {
        "ddp": outcome(ddp, names_of("ddp"), rank, 2),
        "fsdp": outcome(fsdp, names_of("fsdp"), rank, 2),
        "unequal": [
            {name: (full(r.masks), r.sparsity, r.to_dict())}
            for name in ("gradient", "taylor", "wanda")
            for model in (ddp, fsdp)
            for r in [prune(model, name, slices)]
        ],
        "module alone": prune(ddp.module, "gradient", cut(0, 1)).masks,
        "outermost": outermost(rank, 2),
        "refusals": refusals(rank, 2),
        "held": [hold_and_train(model, rank, 2) for model in (ddp, fsdp)],
    }


def on_four(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    ddp, fsdp = DistributedDataParallel(network("uneven")), shard(network("uneven"))
    hybrid = shard(network("uneven"), mesh)
    return {
        "ddp": outcome(ddp, ["taylor", "wanda", "fisher"], rank, 4),
        "fsdp": outcome(fsdp, [*ANYWHERE, "activation_variance"], rank, 4),
        "hybrid": outcome(hybrid, ["magnitude", "snip", "wanda"], rank, 4),
    }


def names_of(how: str) -> list[str]:
    whole = [*WHOLE, *CHANNELS_OF_WHOLE] if how == "ddp" else []
    return [*ANYWHERE, *SCORED, *CHANNELS, *whole]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(on_two, 2, tmp_path_factory.mktemp("two"))


@cache
def alone(net: str) -> dict[str, Any]:
    return outcome(network(net), names_of("ddp"), 0, 1)


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What is not the same: numbers but for the order of sums, masks and counts to the last bit."""
    wrong = []
    for name, value in found.items():
        known = expected[name]
        if name in NUMBERS:
            same = all(torch.allclose(value[n], known[n], rtol=1e-9, atol=1e-12) for n in known)
        else:
            same = value[1:] == known[1:] and all(
                torch.equal(value[0][layer], known[0][layer]) for layer in known[0]
            )
        if not same:
            wrong.append(name)
    return wrong


GROUP = pytest.mark.xdist_group("one_shot_2")


@GROUP
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_find_what_one_process_finds(two: list[Any], how: str) -> None:
    for found in two:
        assert list(found[how]) == names_of(how)
        assert differing(found[how], alone("even")) == []


def test_four_ranks_with_uneven_and_empty_shards_find_the_same(tmp_path: Path) -> None:
    for found in on_ranks(on_four, 4, tmp_path):
        for value in found.values():
            assert differing(value, alone("uneven")) == []


@GROUP
def test_ranks_may_have_batches_of_different_sizes(two: list[Any]) -> None:
    for found in two:
        assert len(found["unequal"]) == 6
        for one in found["unequal"]:
            assert differing(one, alone("even")) == []


@GROUP
def test_the_model_within_ddp_is_pruned_by_each_rank_for_itself(two: list[Any]) -> None:
    for found in two:
        for name, mask in alone("even")["gradient"][0].items():
            assert torch.equal(found["module alone"][name], mask)


@GROUP
def test_masks_are_held_in_training(two: list[Any]) -> None:
    expected = hold_and_train(network("even"), 0, 1)
    for held in (one for found in two for one in found["held"]):
        for name, mask in expected["masks"].items():
            assert torch.equal(held["masks"][name], mask)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(held["weights"][name], weight, rtol=1e-6, atol=1e-9)


@GROUP
def test_weights_that_a_forward_pass_left_whole_are_pruned(two: list[Any]) -> None:
    for found in two:
        for name, weight in applied("wanda").items():
            assert torch.equal(found["outermost"][name], weight), name


@GROUP
def test_what_cannot_be_done_is_refused_on_every_rank(two: list[Any]) -> None:
    for found in two:
        errors = dict(found["refusals"])
        assert "of hidden.weight is not finite" in errors.pop("nan")
        assert "sharded: give a sparsity" in errors.pop("target")
        assert "'gradient' needs equally many batches on every rank" in errors.pop("batches")
        assert "'taylor' needs equally many" in errors.pop("batches of ddp")
        assert errors.keys() == {*WHOLE, *CHANNELS_OF_WHOLE}
        for name, error in errors.items():
            assert "before fully_shard" in error, name
