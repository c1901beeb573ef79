"""The optimizer's step: RMSprop's where the gradient is finite, and none at all where it is not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sst.nn.network import DetectorDescriptor
from sst.nn.optimizer import Update, in_one_buffer
from tests.small import SETTINGS

RATE, DECAY = 1e-3, 1e-2
TORCHS = [("rmsprop", torch.optim.RMSprop, {}), ("adamw", torch.optim.AdamW, {"fused": True})]


def network(channels_last: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = DetectorDescriptor(SETTINGS.network.shape)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def give_gradients(model: nn.Module, seed: int, broken: float | None = None) -> None:
    """Random gradients in every weight's own memory format; the last weight's last number may be broken."""
    generator = torch.Generator().manual_seed(seed)
    weights = list(model.parameters())
    for weight in weights:
        weight.grad = torch.empty_like(weight).copy_(torch.randn(weight.shape, generator=generator))
    if broken is not None:
        weights[-1].grad.flatten()[-1] = broken


def values(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kind", "theirs", "options"), TORCHS)
def test_finite_steps_are_those_of_torch(kind, theirs, options, channels_last: bool) -> None:
    ours, plain = network(channels_last), network(channels_last)
    update = Update(ours, RATE, DECAY, kind)
    optimizer = theirs(plain.parameters(), lr=RATE, weight_decay=DECAY, **options)
    for step, rate in enumerate((1e-3, 1e-3, 1e-4)):
        for model in (ours, plain):
            give_gradients(model, step)
        update.set_rate(rate)
        norm, finite = update.step()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert bool(finite)
        assert float(norm) == pytest.approx(
            float(sum(w.grad.double().square().sum() for w in plain.parameters()) ** 0.5)
        )
    assert all(map(torch.equal, values(ours), values(plain)))
    assert [w.stride() for w in ours.parameters()] == [w.stride() for w in plain.parameters()]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from([None, float("nan"), float("inf"), float("-inf")]), min_size=1, max_size=4),
    st.sampled_from(["rmsprop", "adamw"]),
)
def test_steps_without_a_finite_gradient_leave_no_trace(broken: list[float | None], kind) -> None:
    """Whatever their order, the outcome is that of the finite ones alone."""
    ours, without = network(), network()
    update, other = Update(ours, RATE, DECAY, kind), Update(without, RATE, DECAY, kind)
    for step, value in enumerate(broken):
        give_gradients(ours, step, value)
        assert bool(update.step()[1]) == (value is None)
        if value is None:
            give_gradients(without, step)
            other.step()
    assert all(map(torch.equal, values(ours), values(without)))
    assert all(map(torch.equal, update.state().values(), other.state().values()))


@pytest.mark.parametrize("kind", ["rmsprop", "adamw"])
def test_an_update_goes_on_from_its_saved_state(kind) -> None:
    ours, again = network(), network()
    update, later = Update(ours, RATE, DECAY, kind), Update(again, RATE, DECAY, kind)
    give_gradients(ours, 0)
    update.step()
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    later.restore({name: average.clone() for name, average in update.state().items()})
    for model in (ours, again):
        give_gradients(model, 1)
    update.step(), later.step()
    assert all(map(torch.equal, values(ours), values(again)))


def test_tensors_in_one_buffer_keep_values_and_strides_and_share_it() -> None:
    told = [torch.randn(3, 5), torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(())]
    before, strides = [each.clone() for each in told], [each.stride() for each in told]
    buffer = in_one_buffer(told)
    assert all(map(torch.equal, told, before)) and [each.stride() for each in told] == strides
    buffer.mul_(2)
    assert all(torch.equal(each, 2 * own) for each, own in zip(told, before, strict=True))
    assert all(each.data_ptr() % 256 == buffer.data_ptr() % 256 for each in told)
