"""Continuous batching: at every step one token of each running generation, and a chunk of the prompts that wait.

A step is one forward pass over the packed tokens of all generations, plus one of its own for each that is pinned.
Pinned means: computed alone, its prompt in chunks that begin at fixed places, its answer token by token. Then every
shape that its numbers depend on is its own, and replaying it gives the same bits, whatever runs beside it.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from sllm_actor.domain import EngineLimits, FinishReason, Resume, Sampling
from sllm_actor.engine.attention import Pass, Segment
from sllm_actor.engine.generation import Generation, Step, Work
from sllm_actor.engine.kv_cache import SlotPool, common_prefix, kv_shape
from sllm_actor.engine.lora import Adapters
from sllm_actor.engine.pooling import Pooler, check_text
from sllm_actor.engine.sampling import Sampler, draw_rows, logprobs_of
from sllm_actor.errors import GenerationFailed, InvalidRequest, SllmError

# What a forward pass raises: no memory, a number in the config that only now is used.
MODEL_FAULTS = (RuntimeError, LookupError, ArithmeticError, ValueError, TypeError, MemoryError)
# These rotate all positions of a pass by the largest of them, so what is computed depends on what it is computed with.
ROPES_OF_THE_WHOLE_PASS = frozenset({"dynamic", "longrope"})


class Runner:
    """Owns a model, its slots and the generations on it. Not thread-safe."""

    def __init__(
        self, model: PreTrainedModel, eos_token_ids: Sequence[int], context_tokens: int, limits: EngineLimits
    ) -> None:
        config = model.config.get_text_config()
        config.pad_token_id = None  # Nothing is padded here; GPT-2 looks for padding in each pass, and warns of it.
        self.adapters = Adapters(model)
        self._model = model
        self._eos = frozenset(eos_token_ids)
        self._context_tokens = context_tokens
        self._slot_count = limits.slots
        self._chunk_tokens = limits.prefill_chunk_tokens
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._slots = SlotPool(kv_shape(config, model.dtype, model.device), limits.slots, limits.kv_cache_bytes)
        # transformers 5.24 calls the cache so, and warns of its older name.
        known = inspect.signature(type(model).forward).parameters
        self._cache_argument = "cache" if "cache" in known else "past_key_values"
        rope = getattr(config, "rope_parameters", None) or {}
        self._of_whole_passes = rope.get("rope_type") in ROPES_OF_THE_WHOLE_PASS
        self._arrivals = itertools.count()
        self._waiting: list[tuple[tuple[int, int], Generation]] = []
        self._running: list[Generation] = []
        # Whether the next step may have something to do: not where all that is here waits for tokens from outside.
        self._awake = False

    @property
    def headless(self) -> bool:
        """Whether the model has nothing that makes logits of its hidden states."""
        return self._model.get_output_embeddings() is None

    @property
    def busy(self) -> bool:
        return self._awake and bool(self._running or self._waiting)

    def begin(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        generated: Sequence[int] = (),
        resume: Resume = Resume.FAST,
        adapter: str = "",
        priority: int = 0,
        parked: Generation | None = None,
    ) -> Generation:
        """Take on a generation; the next steps compute it, in order of priority and then of arrival.

        One whose answer so far is whole already has its `finish` at once, and is not run. It goes on with what a
        `parked` one holds, which ends with that.

        Raises:
            GenerationFailed: the model has no such token, no context for the prompt, or not this adapter.
            InvalidRequest: there is not enough memory for its keys and values, even if nothing else ran.
        """
        if not 0 < len(prompt) < self._context_tokens:
            raise GenerationFailed(f"a prompt of {len(prompt)} tokens in a context of {self._context_tokens}")
        self._check([*prompt, *generated], adapter)
        sampler = Sampler(sampling, prompt, self._eos, tuple(generated))
        generation = Generation(prompt, sampler, generated, (priority, next(self._arrivals)))
        generation.pinned = resume is Resume.EXACT or self._of_whole_passes
        generation.adapter = adapter
        if generated:
            self._mark_finish(generation)
        self._check_memory(generation)
        if (parked is None or not self._take_over(generation, parked)) and generation.finish is None:
            self._wait(generation)
        return generation

    def _take_over(self, generation: Generation, parked: Generation) -> bool:
        """Give a generation the slot of a parked one. False: it holds nothing that helps, and is forgotten."""
        if not generation.can_go_on_with(parked):
            self.cancel(parked)
            return False
        generation.slot, parked.slot = parked.slot, None
        generation.started, generation.cached_tokens = True, parked.cached_tokens
        self._running[self._running.index(parked)] = generation
        self._awake = True
        return True

    def park(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        *,
        resume: Resume = Resume.FAST,
        adapter: str = "",
        priority: int = 0,
    ) -> Generation:
        """Hold the keys and values of a prompt and what was generated behind it, for `begin` to go on with.

        A step tells when they are computed, but for the last token. It fails where memory is short.

        Raises:
            GenerationFailed: the model has no such token, no context for them, or not this adapter.
            InvalidRequest: there is not enough memory for its keys and values, even if nothing else ran.
        """
        self._check([*prompt, *generated], adapter)
        parked = Generation(prompt, None, generated, (priority, next(self._arrivals)))
        parked.parked = True
        parked.pinned = resume is Resume.EXACT or self._of_whole_passes
        parked.adapter = adapter
        self._check_memory(parked)
        self._wait(parked)
        return parked

    def extend(self, parked: Generation, tokens: Sequence[int]) -> None:
        """Let a parked generation hold more tokens: those that another engine has generated meanwhile.

        Raises:
            GenerationFailed: the model has no such token, or no context for them.
        """
        self._check([*parked.prompt, *parked.tokens, *tokens], parked.adapter)
        parked.tokens += tokens
        self._awake = True

    def _check(self, tokens: Sequence[int], adapter: str) -> None:
        if not 0 < len(tokens) <= self._context_tokens:
            raise GenerationFailed(f"{len(tokens)} tokens in a context of {self._context_tokens}")
        if (largest := max(tokens)) >= self._vocabulary:
            raise GenerationFailed(f"token {largest} can't be computed: the model knows {self._vocabulary}")
        if not self.adapters.has(adapter):
            raise GenerationFailed(f"the adapter {adapter} is not loaded")

    def _wait(self, generation: Generation) -> None:
        heapq.heappush(self._waiting, (generation.order, generation))
        self._awake = True

    def room_for_texts(self) -> int:
        """Tell how many texts may be here at once: as many as there are slots that no generation needs, but one."""
        all_here = [*self._running, *(generation for _, generation in self._waiting)]
        return max(1, self._slot_count - sum(generation.pooler is None for generation in all_here))

    def begin_embedding(self, prompt: Sequence[int], pooler: Pooler, priority: int = 0) -> Generation:
        """Take on a text, whose hidden states `pooler` makes a vector of; the next steps compute it like a prompt.

        Raises:
            GenerationFailed: the model has no such token, or no context for the text.
            InvalidRequest: there is not enough memory for its keys and values, even if nothing else ran.
        """
        check_text(prompt, self._context_tokens, self._vocabulary)
        generation = Generation(prompt, None, (), (priority, next(self._arrivals)))
        generation.pooler = pooler
        generation.pinned = self._of_whole_passes
        self._check_memory(generation)
        self._wait(generation)
        return generation

    def _check_memory(self, generation: Generation) -> None:
        if generation.known > self._slots.limit_tokens:
            raise InvalidRequest(
                f"{generation.known} tokens of prompt: this instance has memory for the keys and values of "
                f"{self._slots.limit_tokens} tokens (kv_cache_bytes)"
            )

    def cancel(self, generation: Generation) -> None:
        """Forget a generation; its slot is free at once."""
        self._awake = True
        if generation.slot is not None:
            self._leave(generation)
        else:
            self._waiting = [item for item in self._waiting if item[1] is not generation]
            heapq.heapify(self._waiting)

    def step(self) -> Step:
        """Compute a token for all that decode, and a chunk of the prompts; a failure ends those that it concerns."""
        step = Step([], [], [], [])
        self._admit(step)
        self._make_room(step)
        decoding = [(generation, 1) for generation in self._running if generation.decodes]
        prompts = self._chunks()
        shared = [item for item in decoding + prompts if not item[0].pinned]
        shared.sort(key=lambda item: item[0].adapter)  # So that the tokens of each adapter are neighbours.
        alone = [[item] for item in decoding + prompts if item[0].pinned]
        for work in ([shared] if shared else []) + alone:
            self._compute(work, step)
        step.parked.extend(one for one in self._running if one.idle and one.told != one.known)
        for parked in step.parked:
            parked.told = parked.known
        self._awake = bool(decoding or prompts or any(step))
        return step

    def _admit(self, step: Step) -> None:
        while self._waiting:
            generation = self._waiting[0][1]
            # What a pinned one has in its slot must be computed as it was the first time.
            afresh = generation.pinned or generation.afresh
            wanted = () if afresh else generation.tokens_from(0, generation.known - 1)
            slot = self._slots.take(generation.known, wanted, generation.adapter)
            if slot is None:
                return
            heapq.heappop(self._waiting)
            generation.slot = slot
            self._running.append(generation)
            step.admitted.append(generation)

    def _make_room(self, step: Step) -> None:
        """Let every slot hold what is known; the last in order makes way where there is no room, and waits again."""
        for generation in sorted(self._running, key=lambda running: running.order):
            while generation.slot is not None:
                try:
                    if self._slots.grow(generation.slot, generation.known):
                        break
                except MODEL_FAULTS as error:
                    self._fail([generation], GenerationFailed(f"no memory for keys and values: {error}"), step)
                    break
                self._give_way(max(self._running, key=lambda running: running.order), step)

    def _give_way(self, generation: Generation, step: Step) -> None:
        if generation.parked:
            self._fail([generation], GenerationFailed("no memory to hold what is to go on here"), step)
            return
        if len(self._running) == 1:
            # All memory is its own, and as good as a context that is full.
            generation.finish = FinishReason.LENGTH
            generation.drawn = None
            self._leave(generation)
            step.advanced.append(generation)
            return
        self._leave(generation, keep=False)
        generation.started = False
        heapq.heappush(self._waiting, (generation.order, generation))

    def _chunks(self) -> Work:
        """Choose the prompts to go on with, with the tokens of one chunk in all: several together, or a pinned one."""
        room = self._chunk_tokens
        chosen: Work = []
        for generation in self._running:
            if generation.decodes or generation.idle or (generation.pinned and chosen):
                continue
            if generation.pinned:
                generation.started = True
                rest = len(generation.prompt) - generation.written
                return [(generation, rest if self._of_whole_passes else min(rest, self._chunk_tokens))]
            if not generation.started and not self._start(generation, chosen):
                continue
            count = min(generation.reach - generation.written, room)
            if count <= 0:  # What others have is all that a parked one is to hold.
                continue
            room -= count
            chosen.append((generation, count))
            if room == 0:
                break
        return chosen

    def _start(self, generation: Generation, ahead: Work) -> bool:
        """Take what other slots have of its tokens. False: one that is just computed will have more of them."""
        slot = generation.slot
        assert slot is not None
        wanted = () if generation.afresh else generation.tokens_from(0, generation.known - 1)
        self._slots.adopt(slot, wanted)
        for other, _ in ahead:
            both = common_prefix(other.tokens_from(0, other.known), wanted)
            if other.adapter == generation.adapter and both > generation.written:
                return False
        if generation.cached_tokens is None:
            generation.cached_tokens = min(generation.written, len(generation.prompt))
        generation.started = True
        return True

    def _compute(self, work: Work, step: Step) -> None:
        """Run one forward pass and draw a token for each generation of which all is computed then."""
        try:
            ready, logits = self._forward(work)
            drawn = draw_rows(logits, [generation.sampler for generation in ready]) if ready else []
        except MODEL_FAULTS as error:
            concerned = [generation for generation, _ in work]
            self._fail(concerned, GenerationFailed(f"a forward pass failed: {error}"), step)
            return
        for generation, result in zip(ready, drawn, strict=True):
            if isinstance(result, GenerationFailed):
                self._fail([generation], result, step)
                continue
            step.advanced.append(generation)
            if generation.sampler.sampling.max_tokens == 0:
                generation.finish = FinishReason.LENGTH
            else:
                generation.drawn = result
                generation.tokens.append(result.token_id)
                self._mark_finish(generation)
            if generation.finish is not None:
                self._leave(generation)
        for generation, _ in work:
            if generation.pooler is not None and generation.written == generation.known:
                self._end_text(generation, generation.pooler, step)

    def _end_text(self, generation: Generation, pooler: Pooler, step: Step) -> None:
        try:
            generation.vector = pooler.vector()
        except GenerationFailed as error:
            self._fail([generation], error, step)
            return
        generation.finish = FinishReason.STOP
        self._leave(generation, keep=False)
        step.advanced.append(generation)

    def _fail(self, generations: list[Generation], error: SllmError, step: Step) -> None:
        for generation in generations:
            self._leave(generation, keep=False)
            step.failed.append((generation, error))

    def _forward(self, work: Work) -> tuple[list[Generation], torch.Tensor]:
        """Compute the next tokens of each; `[rows, vocabulary]` are the logits behind those that are whole then."""
        tokens: list[int] = []
        positions: list[int] = []
        segments: list[Segment] = []
        ready: list[Generation] = []
        last: list[int] = []
        scored: list[tuple[Generation, int]] = []
        scoring: list[int] = []
        for generation, count in work:
            slot, past = generation.slot, generation.written
            assert slot is not None
            segments.append(Segment(slot, len(tokens), count, past))
            for position in generation.to_score(past, count):
                scored.append((generation, position))
                scoring.append(len(tokens) + position - 1 - past)
            tokens += generation.tokens_from(past, count)
            positions += range(past, past + count)
            if past + count == generation.known and generation.pooler is None:
                ready.append(generation)
                last.append(len(tokens) - 1)
        spans = self.adapters.spans([item[0].adapter for item in work], [count for _, count in work])
        slots, device = Pass(segments), self._model.device
        rows = last + scoring
        kept = 0 if last == rows and len(rows) == len(tokens) else torch.tensor(rows, dtype=torch.long, device=device)
        arguments = {
            "input_ids": torch.tensor([tokens], device=device),
            "position_ids": torch.tensor([positions], device=device),
            "slots": slots,
            "use_cache": True,
            "return_dict": True,
            self._cache_argument: slots,
        }
        with torch.inference_mode(), self.adapters.applied(spans):
            if any(generation.pooler for generation, _ in work):
                hidden = self._model.base_model(**arguments).last_hidden_state[0]
                for (generation, _), (_slot, begin, size, past) in zip(work, segments, strict=True):
                    if generation.pooler is not None:
                        generation.pooler.take(hidden[begin : begin + size], past)
                logits = self._model.get_output_embeddings()(hidden[rows]) if rows else hidden[:0]
            else:
                logits = self._model(**arguments, logits_to_keep=kept).logits[0]
        for (generation, count), (slot, _begin, _size, past) in zip(work, segments, strict=True):
            slot.tokens += generation.tokens_from(past, count)
        for (generation, position), row in zip(scored, logits[len(last) :], strict=bool(scored)):
            top = generation.sampler.sampling.top_logprobs or 0
            generation.scored.append(logprobs_of(row, generation.prompt[position], top))
        return ready, logits[: len(last)]

    def _leave(self, generation: Generation, *, keep: bool = True) -> None:
        assert generation.slot is not None
        self._running.remove(generation)
        self._slots.give_back(generation.slot, keep=keep and not self._of_whole_passes)
        generation.slot = None

    def _mark_finish(self, generation: Generation) -> None:
        if generation.tokens[-1] in generation.sampler.ends:
            generation.finish = FinishReason.STOP
        elif (
            len(generation.tokens) >= generation.sampler.sampling.max_tokens or generation.known >= self._context_tokens
        ):
            generation.finish = FinishReason.LENGTH
