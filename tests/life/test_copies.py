# SPDX-License-Identifier: BSD-3-Clause
"""Copies of a module that has been trained go on as it would have: the next steps and the state
after them are its own, bit for bit, whatever carried it."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch
from life_cases import MODULES, check_same, named, started, steps


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def of_a_copy(module):
    return copy.deepcopy(copy.deepcopy(module))


CARRIERS = {f.__name__: f for f in (through_pickle, through_a_file, of_a_copy)}


@pytest.mark.parametrize("carried", CARRIERS)
@pytest.mark.parametrize(**named(MODULES))
def test_a_copy_goes_on(life, carried):
    module = started(life)
    other = CARRIERS[carried](module)
    assert repr(other) == repr(module) and other.training == module.training
    expected = steps(life, module)
    check_same(steps(life, other), expected)
    shared = {x.data_ptr() for x in module.buffers()} & {x.data_ptr() for x in other.buffers()}
    assert not shared, "each has its own state"


@pytest.mark.parametrize(**named(MODULES))
def test_memory_that_is_shared(life):
    """share_memory(), as where several processes train one model."""
    module = started(life)
    expected = steps(life, copy.deepcopy(module))
    check_same(steps(life, module.share_memory()), expected)
    assert all(x.is_shared() for x in module.buffers())


def in_another_process(connection):
    """Runs in a process that has nothing of this one."""
    torch.set_num_threads(1)
    by_name = {life.name: life for life in MODULES}
    for name, module in connection.recv().items():
        connection.send([x.numpy() for x in steps(by_name[name], module)])
    connection.close()


@pytest.mark.slow
def test_sent_to_a_process_that_is_spawned():
    """Modules as arguments of torch.multiprocessing.spawn and the like: by pickle, and the
    receiver imports what it needs of itself."""
    modules = {life.name: started(life) for life in MODULES}
    expected = [steps(life, copy.deepcopy(modules[life.name])) for life in MODULES]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=in_another_process, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        ours.send(modules)
        for one in expected:
            assert ours.poll(120), "the process answers"
            check_same([torch.from_numpy(x) for x in ours.recv()], one)
    finally:
        ours.close()
        process.join(30)
    assert process.exitcode == 0


def test_functions_can_be_sent_by_name():
    """As partial(masked_cross_entropy, ...) in a configuration: by reference, and the same one."""
    import masked_loss_ext as mle

    for name in mle.__all__:
        public = getattr(mle, name)
        if callable(public):
            assert pickle.loads(pickle.dumps(public)) is public
