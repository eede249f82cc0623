"""The module itself: creation, loading weights, features, files, and what is refused."""

import copy
import io
import json
import pickle

import pytest
import safetensors.torch
import torch
import zoo
from refusals import refuses
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm
from zoo import assert_close

from tnreg import ConvNet, Factorization, ModeTree, Representation, balance_, completion, load, to_cnn
from tnreg.dynamics import predicted_rate
from tnreg.errors import DataError, FileError, OptionError, ShapeError, TreeError

HTF = ModeTree.binary(4)


def test_initial_weights():
    model, again = (Factorization(HTF, 30, 40, std=0.5, generator=zoo.random()) for _ in range(2))
    assert all(torch.equal(w, again.weights[v]) for v, w in model.weights.items())
    assert model.dtype == torch.float32 and model.device.type == "cpu" and model.sizes == (30,) * 4
    for m in (model, Factorization(HTF, 30, 40, std=0.5, dtype=torch.complex64)):
        deviation = m.weights[(0, 1)].abs().square().mean().sqrt().item()
        assert deviation == pytest.approx(0.5, rel=0.05)


def test_it_is_a_module():
    model = zoo.model_of(HTF)
    parameters, weights = model.parameters(), model.weights.values()
    assert sum(p.numel() for p in parameters) == sum(w.numel() for w in weights)
    assert all(key.startswith("stacks.") for key in model.state_dict())
    other = zoo.model_of(HTF, seed=3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.to_tensor(), model.to_tensor())
    other.entries(zoo.random_index(other.sizes, 5))
    assert model.float().dtype == torch.float32 and model.to_tensor().dtype == torch.float32
    task = completion(other, 20)
    task.loss(other)  # plans are kept from here on
    other(zoo.random_features(other.sizes, 3))
    assert pickle.loads(pickle.dumps(task)).loss(other).item() < 1e-24
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(copied.to_tensor(), other.to_tensor())
        copied.load_weights({0: torch.zeros_like(copied.weights[0])})
        assert copied.norm().item() == 0 and other.norm().item() > 0
    assert "diagonal joins" in repr(other) and "ModeTree([[0, 1], [2, 3]])" in repr(other)


def test_gradients_by_node():
    model = zoo.model_of(HTF, zoo.joins_of(HTF)["mixed"])
    assert all(g.abs().max() == 0 for g in model.gradients.values())
    model.to_tensor().square().sum().backward()
    for v, gradient in model.gradients.items():
        other = copy.deepcopy(model)
        weight = model.weights[v].detach().clone()
        step, values = 1e-6 * torch.randn(weight.shape, dtype=torch.float64), []
        for sign in (1, -1):
            other.load_weights({v: weight + sign * step})
            values.append(other.to_tensor().square().sum().item())
        expected = (gradient * step).sum().item()
        assert (values[0] - values[1]) / 2 == pytest.approx(expected, rel=1e-6)


def test_load_weights():
    model = zoo.model_of(HTF)
    before = model.to_tensor().detach()
    weights = {v: w.detach().clone() for v, w in model.weights.items()}
    model.load_weights({v: 2 * w for v, w in weights.items()})
    assert torch.allclose(model.to_tensor(), 2.0 ** len(weights) * before)
    model.load_weights({0: weights[0].float().numpy()})
    assert model.weights[0].dtype == torch.float64
    tensor = model.to_tensor().detach()
    for changes, error, message in [
        ({"x": weights[0]}, TreeError, "no node 'x'"),
        ({1: weights[1], 0: weights[0][:1]}, ShapeError, r"weight of node 0 has another shape"),
        ({1: weights[1], 0: weights[0] * float("nan")}, DataError, "node 0 has NaN or infinite"),
        ({1: weights[1], 0: weights[0] * 1j}, DataError, "complex weight at node 0"),
    ]:
        with pytest.raises(error, match=message):
            model.load_weights(changes)
        assert torch.equal(model.to_tensor(), tensor)  # nothing was copied
    with pytest.raises(OptionError, match="fixed to ones"):
        zoo.model_of(HTF, root="ones").load_weights({HTF.root: torch.ones(3)})


EVEN, UNEVEN = zoo.model_of(HTF, sizes=(3, 3, 3, 3)), zoo.model_of(HTF)
GOOD, FLOAT8 = torch.zeros(2, 4, 3, dtype=torch.float64), torch.float8_e5m2


test_refuses = refuses([
    (lambda: Factorization(HTF, 3, 2, dtype=torch.int64), OptionError,
     "dtype must be a floating or complex torch.dtype"),
    (lambda: Factorization(HTF, 3, 2, dtype="float32"), OptionError, "found 'float32'"),
    (lambda: Factorization(HTF, 3, 2, std=0.0, dtype=FLOAT8), OptionError, "can be computed with, found"),
    (lambda: ConvNet(HTF, 3, 2, dtype=FLOAT8), OptionError, r"found torch\.float8_e5m2"),
    (lambda: Representation(3, dtype=FLOAT8), OptionError, "a floating torch.dtype that can be"),
    (lambda: EVEN.to(FLOAT8), OptionError, "expected: float16, bfloat16, float32, float64, complex64"),
    (lambda: to_cnn(EVEN).to(FLOAT8), OptionError, "expected: float16, bfloat16, float32"),
    (lambda: Representation(3, kind="bins").to(FLOAT8), OptionError, "expected: float16, bfloat16"),
    (lambda: Factorization(HTF, 3, 2, join=["full"]), OptionError, "join must be 'diagonal', 'full' or"),
    (lambda: Factorization(HTF, 3, 2, std="a"), OptionError, "std must be a finite number"),
    (lambda: Factorization(HTF, 3, 2, std=-1.0), OptionError, "std must be a finite number >= 0"),
    (lambda: Factorization(HTF, 3, 2, std=float("nan")), OptionError, "std must be a finite number >= 0"),
    (lambda: EVEN(GOOD[:, :3]), ShapeError, r"found:    \(2, 3, 3\)\n  expected: \(B, 4, 3\) or 4 tensors"),
    (lambda: EVEN(GOOD[0]), ShapeError, "features do not fit the modes"),
    (lambda: EVEN([GOOD[:, 0]] * 3 + [GOOD[:1, 0]]), ShapeError, "features do not fit"),
    (lambda: UNEVEN(GOOD), ShapeError, r"expected: 4 tensors \(B, D_n\) with D = \(2, 3, 5, 7\)"),
    (lambda: UNEVEN([GOOD[:, 0]] * 4), ShapeError, "features do not fit"),
    (lambda: UNEVEN([GOOD[:, 0]] * 3), ShapeError, "features do not fit"),
    (lambda: EVEN(GOOD[:0]), DataError, "an empty batch"),
    (lambda: EVEN(GOOD.float()), DataError, "features have dtype torch.float32, the weights torch.float64"),
    (lambda: UNEVEN.inner(zoo.model_of(ModeTree.half(4))), ShapeError, "same tree and sizes"),
    (lambda: UNEVEN.inner(EVEN), ShapeError, "same tree and sizes"),
    (lambda: UNEVEN.inner(GOOD), OptionError, "with another Factorization, found Tensor"),
])  # fmt: skip


def test_components_need_a_diagonal_join():
    full = zoo.model_of(HTF, "full")
    assert full.local_components() == {} and full.unbalancedness().item() == 0
    with pytest.raises(OptionError, match="no diagonal join"):
        full.component_norms_at(HTF.root)
    with pytest.raises(OptionError, match="full joins only"):
        balance_(full)
    model = zoo.model_of(HTF)
    before = model.to_tensor().detach()
    with pytest.raises(OptionError, match="not balanced to rtol.*\n.*the model is as it was"):
        balance_(model, sweeps=1)
    with pytest.raises(OptionError, match="not balanced to rtol=0 after .*\n.*or a larger rtol"):
        balance_(copy.deepcopy(model), rtol=0)
    assert torch.equal(model.to_tensor(), before)
    broken = copy.deepcopy(model)
    broken.weights[0].data[0, 0] = torch.nan
    with pytest.raises(DataError, match="balance_: the model has NaN or infinite weights"):
        balance_(broken)
    # a dead component
    weight = model.weights[0].detach().clone()
    weight[:, 1] = 0
    model.load_weights({0: weight})
    before = model.to_tensor().detach()
    balance_(model)
    assert torch.allclose(model.to_tensor(), before)
    assert model.local_components()[(0, 1)][1].item() == 0
    assert model.weights[1][:, 1].abs().max().item() == 0


def test_load_refuses_inconsistent_models(tmp_path):
    path = tmp_path / "m.safetensors"
    zoo.model_of(HTF).save(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["tnreg"])

    def check(message, tensors=tensors, **changes):
        changed = {k: v for k, v in {**about, **changes}.items() if v is not None}
        safetensors.torch.save_file(tensors, path, metadata={"tnreg": json.dumps(changed)})
        with pytest.raises(FileError, match=message):
            load(path)

    check("format 'x' is not known", format="x")
    check("'sizes'", sizes=None)
    check("2 mode sizes for a tree over 4 modes", sizes=[2, 3])
    check("mode 1 is missing", tree=[[0, 4], [2, 3]])
    check("another shape", sizes=[2, 3, 5, 8])
    check("unknown root", root="x")
    for changes in ({"bonds": [1]}, {"joins": "x"}, {"dtype": "nonsense"}, {"dtype": "int64"}):
        check("not a factorization", **changes)
    check("missing or not expected", tensors={k: v for k, v in tensors.items() if k != "weight.0"})
    check("missing or not expected", tensors={**tensors, "more": torch.zeros(2)})
    check("NaN", tensors={**tensors, "weight.0": tensors["weight.0"] * float("nan")})
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(FileError, match="without a tnreg tree"):
        load(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(FileError, match="not a safetensors file"):
        load(path)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileError, match="no such model file"):
            load(missing)


class Positive(torch.nn.Module):
    def forward(self, x):
        return x.abs()

    def right_inverse(self, weight):
        return weight


def test_copied_as_modules_are():
    """With the optimizer, hooks, attributes, buffers, shared parameters and parametrizations."""
    box = torch.nn.Module()
    box.model, box.calls = zoo.model_of(HTF), []
    box.model.register_forward_hook(lambda *_: box.calls.append(1))
    box.model.register_buffer("ema", torch.ones(2))
    box.tied, box.model.note = box.model.stacks[0], "mine"
    parametrize.register_parametrization(box.model.stacks, "1", Positive())
    box.model.norm().backward()
    twin, optimizer = copy.deepcopy((box, torch.optim.SGD(box.parameters(), lr=0.1)))
    model = twin.model
    assert {*optimizer.param_groups[0]["params"]} == {*twin.parameters()}
    assert twin.tied is model.stacks[0] and model.note == "mine" and "ema" in model.state_dict()
    assert parametrize.is_parametrized(model.stacks) and model.network is box.model.network
    assert all(torch.equal(g, box.model.gradients[v]) for v, g in model.gradients.items())
    model(zoo.random_features(model.sizes, 2))
    before = model.norm().item()
    optimizer.step()
    assert box.calls and model.norm().item() < before == box.model.norm().item()
    view = to_cnn(box.model).as_factorization()
    own = copy.deepcopy(view)
    assert len(list(own.parameters())) == len(own.stacks) and torch.equal(own.to_tensor(), view.to_tensor())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    index = zoo.random_index(model.sizes, 5)
    assert torch.equal(averaged(index), model.entries(index))


def test_weights_computed_from_other_parameters():
    """What is written is what is read then, or one error; pruned weights follow their parameter."""
    model, features = zoo.model_of(HTF), zoo.random_features((2, 3, 5, 7), 4)
    ones = {v: torch.ones_like(w) for v, w in model.weights.items()}
    parametrize.register_parametrization(model.stacks, "0", Positive())
    weight_norm(model.stacks, "1")
    model.load_weights(ones)
    assert all(torch.allclose(w, ones[v]) for v, w in model.weights.items())
    with pytest.raises(OptionError, match=r"stack 0 is computed .*\n  ValueError: it gives other weights"):
        model.load_weights({1: 2 * ones[1], 0: -ones[0]})
    assert all(torch.allclose(w, ones[v]) for v, w in model.weights.items())
    model(features).sum().backward()
    with pytest.raises(OptionError, match="stack 1 is computed from other parameters"):
        _ = model.gradients
    pruned = zoo.model_of(HTF)
    prune.l1_unstructured(pruned.stacks, "0", 0.5)
    for _ in range(2):  # pruning multiplies anew before each
        pruned(features).sum().backward()
        assert int((pruned.weights[0] == 0).sum()) == pruned.weights[0].numel() // 2
        with torch.no_grad():
            pruned.stacks.get_parameter("0_orig").mul_(2)
    assert torch.equal(copy.deepcopy(pruned).to_tensor(), pruned.to_tensor())
    rates, plain = (
        predicted_rate(m, Factorization.norm)
        for m in (
            model,
            Factorization.from_weights(
                HTF, {v: w.detach() for v, w in model.weights.items()}, join="diagonal"
            ),
        )
    )
    assert all(torch.equal(rates[v], rate) for v, rate in plain.items())
    for setting in (lambda: pruned.load_weights(ones), lambda: pruned.gradients):
        with pytest.raises(OptionError, match="stack 0 is computed from other parameters"):
            setting()
    swapped = {name: 2 * p for name, p in zoo.model_of(HTF).named_parameters()}
    values = torch.func.functional_call(zoo.model_of(HTF, seed=1), swapped, (features,))
    assert torch.allclose(values, 2.0 ** len(ones) * zoo.model_of(HTF)(features))


def test_a_state_dict_names_the_network():
    """Equal shapes are not enough; without the name, as in older files, they are."""
    ours = zoo.model_of(HTF, sizes=3, bonds=2)
    half = zoo.model_of(ModeTree.half(4), sizes=3, bonds=2)
    for a, b in ((ours, half), (to_cnn(ours), to_cnn(half))):
        raw = io.BytesIO()
        torch.save({"outer": torch.nn.Sequential(a).state_dict()}, raw)
        raw.seek(0)
        state = torch.load(raw)["outer"]
        before = {name: value.clone() for name, value in b.state_dict().items()}
        with pytest.raises(OptionError, match=r"differs: tree\.\n  found:    \[0, 1, \[0, 1\], 2, 3, "):
            torch.nn.Sequential(b).load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in b.state_dict().items())
        b.load_state_dict(dict(a.state_dict()))
        again = copy.deepcopy(a).float()
        again.load_state_dict(a.state_dict(), assign=True)
        assert again.dtype == torch.float64
        with pytest.raises(DataError, match="complex weights, the model those of torch.float64"):
            a.load_state_dict({name: value + 0j for name, value in a.state_dict().items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Features of any floating dtype; values in that of the weights, and as exact."""
    model, (x, *more) = zoo.model_of(HTF, dtype=torch.float32), zoo.random_features((2, 3, 5, 7), 4)
    x, tensor, norm = x.to(dtype).requires_grad_(), model.to_tensor(), model.norm()
    with pytest.raises(DataError, match="features have dtype"):
        model([x, *more])
    with torch.autocast("cpu", dtype=dtype):
        value = model([x, *more])
        value.sum().backward()
        assert torch.equal(model.to_tensor(), tensor) and torch.equal(model.norm(), norm)
        with pytest.raises(DataError, match=r"features have dtype torch\.int32"):
            model([x.int(), *more])
    assert_close(value, model([part.float() for part in (x, *more)]), 1e-6)
    assert x.grad.dtype == dtype and x.grad.isfinite().all()


def test_nan_stays_nan():
    model = zoo.model_of(HTF)
    features, index = zoo.random_features(model.sizes, 3), zoo.all_index(model.sizes)
    for node, weight in model.weights.items():
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.weights[node].fill_(torch.nan)
        net = to_cnn(broken)
        for values in (broken(features), broken.entries(index), broken.norm(), net(features)):
            assert values.isnan().all(), (node, weight.shape)
    features[1][0, 0] = torch.nan
    for values in (model(features), to_cnn(model)(features)):
        assert values.isnan().tolist() == [True, False, False]


def test_gradients_of_a_loss_by_node():
    model, other = zoo.model_of(HTF), zoo.model_of(HTF, seed=1)
    model.stacks[0].requires_grad_(False)
    found = model.grad_by_node(model.norm(), create_graph=True)
    model.norm().backward()
    assert all(torch.equal(found[v], g) for v, g in model.gradients.items()) and list(found) == list(
        HTF.nodes
    )
    assert not found[0].any() and found[1].any()
    found[1].sum().backward()  # of the second order
    view = to_cnn(other).as_factorization()
    assert_close(view.grad_by_node(view.norm())[1], other.grad_by_node(other.norm())[1])
    for loss in (other.norm(), model.norm().detach(), model.to_tensor()):
        with pytest.raises(
            OptionError, match="one number with a gradient, computed with the weights of this"
        ):
            model.grad_by_node(loss)


def test_weights_are_to_be_read(tmp_path):
    model = zoo.model_of(HTF)
    for each in (model, to_cnn(model)):
        with pytest.raises(OptionError, match=r"to node 0 would not .*\n  write model.load_weights"):
            each.weights[0] = torch.zeros(2, 2)
        torch.save(each.weights, tmp_path / "weights")
        assert list(torch.load(tmp_path / "weights")) == list(HTF.nodes) == list(each.weights | {0: 1})
    assert 7 not in model.weights and repr(model.weights).startswith("{0: tensor")


def trained_by_node(network, weights, groups, steps=3):
    """Weights after some steps of Adam, every node in a parameter of its own."""
    own = {v: w.detach().clone().requires_grad_(groups.get(v, {}) is not None) for v, w in weights.items()}
    optimizer = torch.optim.Adam([{"params": [w], **(groups.get(v) or {})} for v, w in own.items()], lr=0.1)
    nodes = network.tree.nodes
    for _ in range(steps):
        optimizer.zero_grad()
        stacks = [torch.stack([own[nodes[p]] for p in level.positions]) for level in network.stacks]
        Factorization.viewing(network, stacks).norm().backward()
        optimizer.step()
    return own


def test_settings_by_node(tmp_path):
    """Learning rates, decay and freezing of any nodes are those of separate parameters; then others."""
    tree = ModeTree.binary(8)
    model = zoo.model_of(tree, sizes=(3,) * 8, bonds=2)
    keys, twin = list(model.state_dict()), copy.deepcopy(model)
    slow, decay = {"lr": 1e-3}, {"weight_decay": 0.5}
    for groups in ({0: slow, 3: slow, 4: decay, (0, 1): None, tree.root: slow}, {7: None}, {}):
        wanted = trained_by_node(model.network, model.weights, groups)
        optimizer = torch.optim.Adam(model.parameter_groups(groups), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model.norm().backward()
            optimizer.step()
        for v, weight in model.weights.items():
            assert_close(weight, wanted[v])
            expected = torch.zeros_like(weight) if groups.get(v, {}) is None else wanted[v].grad
            assert_close(model.gradients[v], expected, 1e-11)
        again = copy.deepcopy(model)
        again.load_weights({v: 2 * w for v, w in model.weights.items()})
        assert_close(again.to_tensor(), 2.0**15 * model.to_tensor())
        again.load_state_dict(model.state_dict())
        again.save(tmp_path / "model")
        assert torch.equal(load(tmp_path / "model").to_tensor(), model.to_tensor())
    assert sorted(model.state_dict()) == keys
    twin.load_state_dict(model.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    weight_norm(model.stacks, "0")
    assert len(model.parameter_groups({v: slow for v in range(8)})[1]["params"]) == 2
    with pytest.raises(OptionError, match="its nodes cannot have different settings"):
        model.parameter_groups({0: slow})


test_refused_settings = refuses([
    ({"x": {}}, TreeError, "no node 'x'"),
    ({0: 1e-3}, OptionError, r"options of node 0 must be \{name: value\} .*found 0\.001"),
    ({0: {"params": []}}, OptionError, "options of node 0 must be"),
    ({HTF.root: {"lr": 1.0}}, OptionError, "fixed to ones"),
], lambda settings: zoo.model_of(HTF, root="ones").parameter_groups(settings))  # fmt: skip
