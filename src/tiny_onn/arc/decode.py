"""Greedy decoding of test inputs under many views.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from tiny_onn.arc import tokens
from tiny_onn.arc.augment import View, views
from tiny_onn.arc.grammar import GridGrammar
from tiny_onn.arc.grids import Grid
from tiny_onn.arc.tasks import Task
from tiny_onn.models import TinyOnnForCausalLM


@dataclass(frozen=True)
class DecodeConfig:
    """How test inputs are decoded.

    Attributes:
        views: views of each test input: the eight symmetries, then colour permutations of them.
        context_pairs: demonstrations before the test input in the prompt.
        batch_tokens: most tokens decoded side by side, prompts and answers together.
        hopeless: an answer is given up once its log-probability, in nats, falls below minus this.
        rescored: how many of the most voted answers are ranked by their probability under all of
            the first ``rescoring_views`` views; with 0 views the votes decide.
    """

    views: int = 64
    context_pairs: int = 0
    batch_tokens: int = 32_768
    hopeless: float = 40.0
    rescored: int = 6
    rescoring_views: int = 16

    def __post_init__(self) -> None:
        bounds = (("views", 1), ("context_pairs", 0), ("batch_tokens", 1), ("hopeless", 0))
        for name, least in (*bounds, ("rescored", 0), ("rescoring_views", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}. Got {getattr(self, name)}")


@dataclass(frozen=True)
class Prompt:
    """One view of one test input.

    Attributes:
        task: index of the task, the row of its embedding; test: index of its test input.
        view: how it is seen; ids: its tokens ``[T]``, ending where the answer begins.
    """

    task: int
    test: int
    view: View
    ids: np.ndarray


@dataclass(frozen=True)
class Decoded:
    """What the model answered to a prompt.

    Attributes:
        grid: the answer in the task's own frame, None where it is not a grid.
        log_prob: log-probability of the answer's tokens, nats; -inf if it was given up.
    """

    prompt: Prompt
    grid: Grid | None
    log_prob: float


def make_prompts(
    tasks: Sequence[Task], config: DecodeConfig, *, seed: int, keep_background: bool = True
) -> list[Prompt]:
    """All views of all test inputs of all tasks.

    Which demonstrations stand before a test input, and in what order, differs from view to view.
    """
    prompts = []
    for index, task in enumerate(tasks):
        chosen = views(task, count=config.views, seed=seed, keep_background=keep_background)
        for test, pair in enumerate(task.test):
            for number, view in enumerate(chosen):
                order = np.random.default_rng((seed, test, number)).permutation(len(task.train))
                seen = view.apply_task(task)
                context = [seen.train[i] for i in order[: config.context_pairs]]
                ids = tokens.encode_sequence(context, view.apply(pair.input))
                prompts.append(Prompt(index, test, view, ids))
    return prompts


@torch.inference_mode()
def decode(
    model: TinyOnnForCausalLM,
    prompts: Sequence[Prompt],
    config: DecodeConfig,
    *,
    use_cache: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Decoded]:
    """Write the most probable next token, by the grid grammar, until every answer has ended.

    Prompts of like length are decoded side by side. ``use_cache=False`` computes the same answers
    from whole sequences at every step.

    Args:
        on_progress: called with (prompts done, prompts in all).
    """
    model.eval()
    answers: dict[int, Decoded] = {}
    for group in _groups(prompts, config.batch_tokens):
        batch = [prompts[i] for i in group]
        for i, (ids, log_prob) in zip(
            group, _greedy(model, batch, config.hopeless, use_cache), strict=True
        ):
            answers[i] = _decoded(prompts[i], ids, log_prob, config.hopeless)
        if on_progress is not None:
            on_progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


def _decoded(prompt: Prompt, ids: np.ndarray, log_prob: float, hopeless: float) -> Decoded:
    """The answer in the task's own frame; one that was hopeless is none, even if it went on to
    its end because others beside it did."""
    if log_prob < -hopeless:
        return Decoded(prompt, None, -math.inf)
    seen = tokens.decode_grid(ids)
    return Decoded(prompt, None if seen is None else prompt.view.invert(seen), log_prob)


def _groups(prompts: Sequence[Prompt], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts, sorted by length and cut so that prompt and answer fit the budget."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    group: list[int] = []
    for i in order:
        # An answer is taken to be as long as its prompt; a longer one only costs memory.
        if group and (len(group) + 1) * 2 * len(prompts[i].ids) > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def left_padded(sequences: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Token sequences as one tensor ``[B, T]``, int64, padded on the left."""
    length = max(len(ids) for ids in sequences)
    padded = np.full((len(sequences), length), tokens.PAD)
    for row, ids in zip(padded, sequences, strict=True):
        row[length - len(ids) :] = ids
    return torch.from_numpy(padded).to(device)


def _greedy(
    model: TinyOnnForCausalLM, prompts: Sequence[Prompt], hopeless: float, use_cache: bool
) -> list[tuple[np.ndarray, float]]:
    """Answer tokens and their log-probability for each prompt; a hopeless answer has no end."""
    device = model.device
    ids = left_padded([p.ids for p in prompts], device)
    start = ids.shape[1]
    embeddings = {
        "task_ids": torch.tensor([p.task for p in prompts], device=device),
        "symmetry_ids": torch.tensor([p.view.symmetry for p in prompts], device=device),
    }
    grammar = GridGrammar(len(prompts), device)
    log_probs = torch.zeros(len(prompts), device=device)
    cache = DynamicCache(config=model.config) if use_cache else None
    place = torch.arange(len(prompts), device=device)
    answers: list[tuple[np.ndarray, float]] = [(np.empty(0, dtype=np.int64), 0.0)] * len(prompts)
    fresh = start
    while True:
        logits = _next_logits(model, ids, fresh, embeddings, cache)
        fresh = 1 if use_cache else ids.shape[1] + 1
        token = logits.masked_fill(~grammar.allowed(), -torch.inf).argmax(-1)
        gained = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
        log_probs = log_probs + gained.masked_fill(grammar.finished, 0.0)
        grammar.advance(token)
        ids = torch.cat([ids, token[:, None]], dim=1)
        done = grammar.finished | (log_probs < -hopeless)
        # Dropping finished sequences copies the cache, so it waits until a quarter can go.
        if int(done.sum()) * 4 < len(done):
            continue
        for i in done.nonzero().squeeze(1).tolist():
            answers[int(place[i])] = (ids[i, start:].cpu().numpy(), float(log_probs[i]))
        going = (~done).nonzero().squeeze(1)
        if not len(going):
            return answers
        ids, log_probs, place = ids[going], log_probs[going], place[going]
        embeddings = {name: value[going] for name, value in embeddings.items()}
        grammar.keep(going)
        if cache is not None:
            cache.batch_select_indices(going)


def _next_logits(
    model: TinyOnnForCausalLM,
    ids: Tensor,
    fresh: int,
    embeddings: dict[str, Tensor],
    cache: DynamicCache | None,
) -> Tensor:
    """Logits ``[B, V]`` after the last token, of which the last ``fresh`` are not in the cache."""
    outputs = model(
        input_ids=ids[:, -fresh:],
        attention_mask=(ids != tokens.PAD).long(),
        position_ids=model.model.token_positions(ids)[..., -fresh:],
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=1,
        **embeddings,
    )
    return outputs.logits[:, -1].float()


@torch.inference_mode()
def log_likelihoods(
    model: TinyOnnForCausalLM, prompts: Sequence[Prompt], grids: Sequence[Grid], batch_tokens: int
) -> list[float]:
    """Log-probability, in nats, of answering each prompt with a grid of the task's own frame."""
    model.eval()
    answers = [
        np.concatenate([tokens.encode_grid(p.view.apply(grid)), [tokens.END]])
        for p, grid in zip(prompts, grids, strict=True)
    ]
    whole = [
        Prompt(p.task, p.test, p.view, np.concatenate([p.ids, answer]))
        for p, answer in zip(prompts, answers, strict=True)
    ]
    found = [0.0] * len(whole)
    for group in _groups(whole, batch_tokens):
        ids = left_padded([whole[i].ids for i in group], model.device)
        logits = model(
            input_ids=ids,
            attention_mask=(ids != tokens.PAD).long(),
            task_ids=torch.tensor([whole[i].task for i in group], device=ids.device),
            symmetry_ids=torch.tensor([whole[i].view.symmetry for i in group], device=ids.device),
            use_cache=False,
        ).logits
        losses = F.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
        for row, i in enumerate(group):
            found[i] = -float(losses[row, -len(answers[i]) :].sum())
    return found
