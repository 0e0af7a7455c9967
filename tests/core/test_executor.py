from collections.abc import Callable, Sequence

import pytest
import torch
from chain import Chain, small_batch
from tiny import backward, exact, trainer

from tangram.core.context import Parallel
from tangram.core.executor import Executor
from tangram.core.layout import Layout
from tangram.core.plan import Action, Op, Plan, Slot
from tangram.core.records import Carry, Progress
from tangram.testing import assert_close, assert_same_gradients


def _plain_gradients(*overrides: str) -> dict[str, torch.Tensor]:
    """Gradients of one autograd graph over the whole batch: no executor, no micro-batches, no weights on roots."""
    run = trainer(exact(*overrides))
    batch = run.data.batch(run.progress, 4)
    carry = run.model(batch, run.progress)
    weights = run.model.weights(run.progress)
    sum(weights[name] * loss.value for name, loss in carry.losses).backward()
    return {address: p.grad for address, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "overrides", [(), ("model.recompute=selective",), ("model.recompute=full",), ("objectives.mtp.depth=2",)]
)
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_gradients_equal_one_plain_graph_however_the_batch_is_cut(micro: int, overrides: tuple[str, ...]) -> None:
    run = trainer(exact(f"train.micro_sequences={micro}", *overrides))
    found, expected = backward(run), _plain_gradients(*overrides)
    assert found.keys() == expected.keys() == dict(run.model.named_parameters()).keys()
    for address, gradient in expected.items():
        difference = float((found[address] - gradient).norm() / gradient.norm())
        assert difference < 1e-12, f"{address}: {difference}"


def test_losses_and_load_do_not_depend_on_the_cut() -> None:
    results = []
    for micro in (1, 2, 4):
        run = trainer(exact(f"train.micro_sequences={micro}"))
        results.append(run.executor.run(run.data.batch(run.progress, 4), run.progress))
    first = results[0]
    for other in results[1:]:
        assert torch.equal(first.load, other.load)
        for name, loss in first.losses.items():
            assert other.losses[name] == pytest.approx(loss, rel=1e-12)
    assert int(first.load.sum()) == 3 * 4 * 12 * 2  # routed layers (two, and MTP's), tokens, experts each
    assert (first.load[0] == 0).all()
    assert [result.peak_live for result in results] == [1, 1, 1]


def test_the_total_is_the_weighted_sum() -> None:
    run = trainer(exact())
    result = run.executor.run(run.data.batch(run.progress, 4), run.progress)
    weights = run.model.weights(run.progress)
    assert set(result.losses) == {"next_token", "mtp", "sequence_balance"}
    assert result.total == pytest.approx(sum(weights[name] * loss for name, loss in result.losses.items()))


def _staged(backward: Sequence[Op]) -> Callable[[int], Plan]:
    def plan(microbatches: int) -> Plan:
        slots = [[Slot(0, stage, m) for stage in range(3)] for m in range(microbatches)]
        actions = [Action(Op.FORWARD, slot) for stages in slots for slot in stages]
        actions += [Action(backward[0], slot) for stages in slots for slot in reversed(stages)]
        actions += [Action(op, slot) for op in backward[1:] for stages in slots for slot in stages]
        return Plan(3, (microbatches,), {(0, stage): 0 for stage in range(3)}, (actions,))

    return plan


@pytest.mark.parametrize("ops", [[Op.BACKWARD], [Op.INPUT_BACKWARD, Op.WEIGHT_BACKWARD]])
def test_stages_and_split_backward_give_the_gradients_of_one_graph(ops: list[Op]) -> None:
    torch.manual_seed(0)
    program, batch = Chain(3), small_batch(4)
    reduced: list[bool] = []
    parallel = Parallel(program.queue, Layout(dict.fromkeys([(0, 0), (0, 1), (0, 2)], 0)))

    def reduce() -> None:
        reduced.append(all(p.grad is not None for p in program.parameters()))

    result = Executor(program, _staged(ops), 2, parallel, reduce).run(batch, Progress())
    found = {name: p.grad.clone() for name, p in program.named_parameters()}
    program.zero_grad()
    carry, total = Carry(), torch.zeros((), dtype=torch.float64)
    for stage in range(3):
        for phase in program.phases(stage, batch, Progress()):
            carry = phase.fn(carry)
    for _, loss in carry.losses:
        total = total + 0.5 * loss.value
    total.backward()
    assert_same_gradients(found, {name: p.grad for name, p in program.named_parameters()}, length=60)
    assert result.total == pytest.approx(total.item())
    assert reduced == [True]  # once, after the last weight gradient


def test_input_backward_alone_leaves_the_weights_of_linears_without_gradient() -> None:
    torch.manual_seed(0)
    program = Chain(3)
    queue = program.queue
    with queue.deferred() as pending:
        carry = Carry()
        for stage in range(3):
            for phase in program.phases(stage, small_batch(2), Progress()):
                carry = phase.fn(carry)
        carry.losses[-1][1].value.backward()
    assert all(p.grad is None for p in program.parameters())
    assert len(pending) == 3
    for add in pending:
        add()
    assert all(p.grad is not None and not p.grad.requires_grad for p in program.parameters())


def test_an_evaluation_takes_no_gradient_and_a_smaller_last_micro_batch() -> None:
    from tangram.core.plan import forward_only

    run = trainer(exact())
    batch = run.data.batch(run.progress, 5)
    executor = Executor(
        run.model, lambda count: forward_only({(0, 0): 0}, count), 2, Parallel(), lambda: pytest.fail("reduced")
    )
    result = executor.run(batch, run.progress)
    whole = run.model(batch, run.progress)
    for name, loss in whole.losses:
        assert_close(torch.tensor(result.losses[name], dtype=torch.float64), loss.value.detach(), length=60)
    assert all(p.grad is None for p in run.model.parameters())
