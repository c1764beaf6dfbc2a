"""Questions to a sparsifier: what they answer of weights that are not the run's, and that they change nothing."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.sparse.methods import EVERY, Run, assert_equal

ASK = {
    "sparsity": lambda sparsifier: sparsifier.sparsity(),
    "layers": lambda sparsifier: sparsifier.layers(),
    "live_masks": lambda sparsifier: sparsifier.live_masks(),
    "dense_weights": lambda sparsifier: sparsifier.dense_weights(),
    "state_dict": lambda sparsifier: sparsifier.state_dict(),
}


def halved(model):
    """Other weights, as an average has them: in other places too."""
    other = copy.deepcopy(model.state_dict())
    for name, value in other.items():
        if value.is_floating_point() and "running" not in name:
            value.mul_(0.5).add_(0.01)
    return other


def put(model, state, way):
    if way == "loaded":
        model.load_state_dict(state)
    elif way == "data":  # which leaves no mark
        for name, parameter in model.named_parameters():
            parameter.data.copy_(state[name])
    else:  # other parameters, for as long as the question takes
        for name, _ in list(model.named_parameters()):
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, nn.Parameter(state[name].clone()))


@pytest.mark.parametrize("question", ASK)
@pytest.mark.parametrize("case", EVERY)
def test_a_question_about_an_average_leaves_the_training_as_it_is(case, question):
    ends = []
    for asks in (False, True):
        run = Run(case, total_steps=20)
        for _ in range(4):
            run.train(4)
            mine = copy.deepcopy(run.plain.state_dict())
            run.plain.load_state_dict(halved(run.plain))
            if asks:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    ASK[question](run.sparsifier)
            run.plain.load_state_dict(mine)
        ends.append(run.train(4).state())
    assert_equal(*ends)


@pytest.mark.parametrize("case", EVERY)
def test_a_copy_that_is_asked_in_inference_mode_goes_on(case):
    run = Run(case, total_steps=20).train(4)
    ends = []
    for mode in (False, True):
        model, sparsifier = copy.deepcopy((run.plain, run.sparsifier))
        with torch.inference_mode(mode):
            for question in ASK.values():
                question(sparsifier)
        sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.0))
        with torch.inference_mode(mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a run that ends early
            sparsifier.finalize()
        ends.append(model.state_dict())
    assert_equal(*ends)


@pytest.mark.parametrize("way", ["loaded", "data", "replaced"])
def test_a_checkpoint_under_an_average_leaves_the_training_as_it_is(way):
    ends = []
    for asks in (False, True):
        run = Run("autosparse-accuracy", total_steps=20).train(9)
        parameters, mine = dict(run.plain.named_parameters()), copy.deepcopy(run.plain.state_dict())
        put(run.plain, halved(run.plain), way)
        if asks:
            with pytest.warns(UserWarning, match="changed outside"):
                run.sparsifier.state_dict()
        if way == "replaced":
            for name, parameter in parameters.items():
                owner, _, own = name.rpartition(".")
                setattr(run.plain.get_submodule(owner), own, parameter)
        else:
            put(run.plain, mine, way)
        ends.append(run.train(11).state())
    assert_equal(*ends)


@pytest.mark.filterwarnings("ignore:weights were changed outside")
@pytest.mark.parametrize("case", EVERY)
def test_weights_that_are_loaded_asked_about_and_kept_are_trained(case):
    ends = []
    for asks in (False, True):
        run = Run(case, total_steps=20).train(8)
        run.plain.load_state_dict(halved(run.plain))
        for ask in ASK.values() if asks else ():
            ask(run.sparsifier)
        ends.append(run.train(4).state())
    assert_equal(*ends)


@pytest.mark.filterwarnings("ignore:weights were changed outside")
def test_weights_without_a_mark_that_were_asked_about_are_trained():
    run = Run("topk", total_steps=1000).train(9)  # the next step does not measure
    wanted = halved(run.plain)
    put(run.plain, wanted, "data")
    run.sparsifier.state_dict()
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    run.train(1)
    assert (run.plain[8].weight - wanted["8.weight"])[run.plain[8].weight != 0].abs().max() < 1e-6


@pytest.mark.parametrize("case", EVERY)
def test_answers_are_copies(case):
    run = Run(case, total_steps=40).train(20)
    masks, dense = run.sparsifier.live_masks(), run.sparsifier.dense_weights()
    before = copy.deepcopy((masks, dense))
    run.train(15)
    assert_equal(masks, before[0])
    assert_equal(dense, before[1])
    state = run.state()
    for answer in (*run.sparsifier.live_masks().values(), *run.sparsifier.dense_weights().values()):
        answer.fill_(1)
    assert_equal(run.state(), state)
