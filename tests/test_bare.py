"""Leaves without a weight: what they are, what is refused, files. Laws over the zoo are in other tests."""

import pytest
import torch
import zoo
from refusals import refuses

from tnreg import Factorization, ModeTree, OptionError, ShapeError, TreeError, algebra, load, plan

HTF, TRAIN = ModeTree.binary(4), ModeTree.caterpillar(5)


def train(bonds=3):
    return Factorization(TRAIN, 4, bonds, join="full", leaves="bare", std=1.0, dtype=torch.float64)


def test_a_train_holds_its_cores():
    """Leaves beyond the first are modes of the cores, whatever one integer says of ranks."""
    model = train()
    assert [tuple(w.shape) for w in model.weights.values()] == [(4, 4, 3), (3, 4, 3), (3, 4, 3), (3, 4)]
    assert model.network.bonds[:2] == (4, 4) and "5 bare leaves" in repr(model)
    cores = list(model.weights.values())
    wanted = torch.einsum("abr,rcs,sdt,te->abcde", *cores)
    zoo.assert_close(model.to_tensor(), wanted)
    mixed = Factorization(TRAIN, 4, 3, join="full", leaves={1: "bare", 3: "bare"})
    assert set(TRAIN.leaves) - set(mixed.weights) == {1, 3}


def test_under_a_diagonal_join_the_mode_is_the_bond():
    model = Factorization(
        HTF, (2, 2, 5, 7), {(0, 1): 3, (2, 3): 3, 3: 5}, leaves={0: "bare", 1: "bare", 2: "bare"}
    )
    assert model.network.named_bonds == {0: 2, 1: 2, (0, 1): 3, 2: 5, 3: 5, (2, 3): 3}
    assert not model.to_tensor()[0, 1].any() and model.to_tensor()[0, 0].all()


@pytest.mark.parametrize("model", list(zoo.bare_zoo()))
def test_files(model, tmp_path):
    model.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert again.network == model.network and torch.equal(again.to_tensor(), model.to_tensor())
    net = model.network
    built = Factorization.from_weights(net.tree, model.weights, join=net.named_joins, leaves=net.named_leaves)
    assert built.network == net and torch.equal(built.to_tensor(), model.to_tensor())


def test_the_dense_tensor_is_no_view():
    """With bare leaves alone the weight of a star is the tensor itself."""
    model = Factorization(ModeTree.star(3), (2, 3, 4), 1, join="full", leaves="bare")
    model.to_tensor().detach().zero_()
    assert model.weights[model.tree.root].all()


def test_entries_take_rows_of_the_cores():
    """Of a mode of a thousand no identity is made, and a row is all that is counted."""
    model = Factorization(ModeTree.caterpillar(12), 1000, 2, join="full", leaves="bare", std=1.0)
    index = zoo.random_index(model.sizes, 5)
    assert plan(model, index=index).held < 1000
    row = model.weights[model.tree.root][:, index[:, 11]]
    assert model.entries(index).shape == (5,) and row.shape == (2, 5)


WEIGHTS, ROOT = dict(train().weights), {TRAIN.root: torch.ones(3, 4)}
RANKS = dict.fromkeys(HTF.nodes[:-1], 3)
test_refusals = refuses([
    (lambda: Factorization(HTF, 4, 3, leaves="none"), OptionError, "'weights' or 'bare'"),
    (lambda: Factorization(HTF, 4, 3, leaves={(0, 1): "bare"}), OptionError, "no leaf"),
    (lambda: Factorization(HTF, 4, 3, leaves={9: "bare"}), TreeError, "9"),
    (lambda: Factorization(HTF, (2, 3, 4, 5), 3, leaves="bare"), ShapeError, "different ranks"),
    (lambda: Factorization(HTF, 4, RANKS, leaves="bare"), ShapeError, "leave it out"),
    (lambda: Factorization(ModeTree.star(3), 4, 4, root="ones", leaves="bare"), OptionError, "no weights"),
    (lambda: train().load_weights({0: torch.eye(4)}), OptionError, "leaf 0 is bare"),
    (lambda: Factorization.from_weights(TRAIN, WEIGHTS), ShapeError, "no weight for node 0"),
    (lambda: Factorization.from_weights(TRAIN, ROOT, leaves="bare"), ShapeError, "no weight"),
])  # fmt: skip


@pytest.mark.parametrize(
    "model", [p for p in zoo.zoo(bare=True) if p.id.endswith(("full", "mixed", "some-bare"))]
)
def test_leaves_are_multiplied_in(model):
    """By default where that saves numbers; the tensor is the same."""

    def numbers(m):
        return sum(w.numel() for w in m.weights.values())

    full = algebra.full_joins(model)
    every, some = algebra.bare_leaves(full, full.tree.leaves), algebra.bare_leaves(model)
    assert len(every.network.bare) == model.tree.order and numbers(some) <= numbers(model)
    for other in (every, some):
        zoo.assert_close(other.to_tensor(), model.to_tensor())
    wide = zoo.model_of(TRAIN, "full", sizes=(3,) * 5, bonds=3)
    assert numbers(algebra.bare_leaves(wide)) == numbers(wide) - 5 * 9
    with pytest.raises(OptionError, match="no leaf under a full join"):
        algebra.bare_leaves(zoo.model_of(TRAIN), [0])
