"""Memory of a learner rank and of a rollout actor, item by item, from the run's settings and the model's sizes.

What DeepSpeed 0.19 holds was read in its sources and is named so in the items' notes; everything else follows from this
code base. docs/planning.md has the formulas and the measured peaks.
"""

import math
from dataclasses import dataclass
from typing import Literal

from learner.planning import activations
from learner.planning.activations import Trunk
from learner.planning.scored import LargestForward, above_mean, largest_forward
from learner.planning.shapes import ModelShape
from learner.settings.run import RunConfig
from rollout.engines.vllm.settings import ADAPTERS, MERGED, slot_rank
from rollout.gpu import CUDA_ALLOWANCE, NCCL_ALLOWANCE
from rollout.models.few_bits import BYTES_PER_PARAMETER
from rollout.sampling.schedule import tokens_per_step
from rollout.trajectory import GreedyBranches

GIB = 1 << 30
GATHERED_LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at once, at most (its stage3_max_live_parameters)."""
FRAGMENTATION = 0.05
"""Assumed: share of what is allocated and freed that the CUDA allocator can't hand out again."""
PROCESS_ALLOWANCE = int(0.6 * GIB)
"""Python with torch, transformers and Ray imported; 0.55 to 0.61 GB measured on the CPU."""

VLLM_ALLOWANCE = int(0.3 * GIB)
"""vLLM imported too, and what it keeps for itself; measured on the CPU."""

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Item:
    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class ProcessMemory:
    """What one process holds. ``resident`` is there all the time, ``kept`` while a forward waits for its backward. Of
    ``moments`` only the largest counts: they don't meet. What comes ``after`` the last backward finds nothing kept."""

    name: str
    device: Device
    resident: tuple[Item, ...]
    kept: tuple[Item, ...]
    moments: tuple[Item, ...]
    after: tuple[Item, ...]
    host: tuple[Item, ...]
    """In the node's memory, where the device is a GPU."""
    mapped: int
    """Bytes of the checkpoint's file that all processes of a node map together: on a CPU a part of ``resident``, beside
    a GPU of no process's own."""

    @property
    def largest_moment(self) -> Item:
        return max(self.moments, key=lambda item: item.bytes)

    @property
    def allocator(self) -> int:
        """What fragmentation may cost."""
        return int(FRAGMENTATION * self.dynamic) if self.device == "cuda" else 0

    @property
    def dynamic(self) -> int:
        """Bytes above what is resident."""
        during = sum(item.bytes for item in self.kept) + self.largest_moment.bytes
        return max(during, *(item.bytes for item in self.after), 0)

    @property
    def peak(self) -> int:
        """Bytes on the device."""
        return sum(item.bytes for item in self.resident) + self.dynamic + self.allocator

    @property
    def own(self) -> int:
        """Bytes of the peak on a CPU that no other process shares."""
        return self.peak - self.mapped

    @property
    def host_bytes(self) -> int:
        return sum(item.bytes for item in self.host)


def itemsize(config: RunConfig) -> int:
    """e, bytes of a number in the model's dtype."""
    return 2 if config.learner.dtype == "bfloat16" else 4


def truncation(config: RunConfig) -> str:
    """Of the training sampler, as ``activations.sampling`` names it."""
    sampler = config.rollout.sampler
    return "top_k" if sampler.top_k is not None else "top_p" if sampler.top_p < 1.0 else "none"


def scored_rows(config: RunConfig, views: int) -> tuple[int, int]:
    """(positions scored, candidates of scored choices) of so many views on average: the objective's, and a full block
    of each."""
    sampler = config.rollout.sampler.spec()
    cost = config.objective.cost(sampler)
    chooses = cost.choices and sampler.scores_positions
    return math.ceil(views * cost.scored), views * sampler.block_length if chooses else 0


def rank_memory(
    config: RunConfig,
    model: ModelShape,
    *,
    device: Device,
    prompt: int,
    views: int | None = None,
    checkpointing: bool | None = None,
) -> ProcessMemory:
    """One learner rank.

    Args:
        prompt: tokens of the longest prompt.
        views: instead of ``learner.views_per_forward``.
        checkpointing: instead of ``learner.activation_checkpointing``.
    """
    learner, e = config.learner, itemsize(config)
    largest = largest_forward(config, views)
    checkpointing = learner.activation_checkpointing if checkpointing is None else checkpointing
    length = prompt + config.rollout.sampler.completion_length
    scores = config.learner.deterministic and device == "cuda"
    head_rows = max(largest.positions, largest.candidates)
    trunk = Trunk(model, largest.views, length, config.lora.r, e, scores, head_rows)
    remark = "inputs of the blocks; one block's rest is recomputed" if checkpointing else "no checkpointing"
    moments = [
        Item("logits at scored positions", _scoring(config, model, largest), _scoring_note(largest)),
        Item(
            "one block's backward",
            activations.working_backward(trunk, checkpointing=checkpointing),
            "its gradients, and its tensors computed again" if checkpointing else "its gradients",
        ),
        Item("one block's forward", activations.working_forward(trunk)),
    ]
    return ProcessMemory(
        name="learner rank",
        device=device,
        resident=(
            *_weights(config, model, rank=True),
            *_training_state(config, model),
            *_allowances(config, device, rank=True),
        ),
        kept=(
            *_bucket(config, model),
            Item("activations", activations.kept(trunk, checkpointing=checkpointing), remark),
        ),
        moments=tuple(moments),
        after=(_step(config, model),),
        host=_host(device),
        # DeepSpeed sends rank 0's weights to the others, which then hold a copy.
        mapped=_mapped(config, model, device, on_cpu=config.learner.ranks == 1),
    )


def actor_memory(
    config: RunConfig, model: ModelShape, *, device: Device, prompt: int, rows: int | None = None
) -> ProcessMemory:
    """One rollout actor, or of a model that is split over several processes one of them. ``rows`` stands instead of
    ``rollout.max_rows``."""
    sampler, e = config.rollout.sampler, itemsize(config)
    rows = config.rollout.max_rows if rows is None else rows
    length = prompt + sampler.completion_length
    embedded = config.rollout.engine == "torch"
    if not embedded:
        rows = min(rows, config.rollout.vllm.batch_tokens(rows, length) // length)
    scores = config.learner.deterministic and device == "cuda" and embedded
    trunk = Trunk(model, rows, length, config.lora.r, e, scores)
    revealed = max(tokens_per_step(sampler.completion_length, sampler.block_length, sampler.steps))
    block = rows * sampler.block_length
    V, cpu = model.vocabulary, device == "cpu"
    drawn = rows * revealed
    if sampler.position_rule in ("low_confidence", "entropy"):
        drawn = block
    filled, at_once = _filled(config, rows)
    also = f", and logits at {filled:,} positions of branches" if filled else ""
    kind = truncation(config)
    # A fill's fp32 copy of the logits is gone when its law is made, a step's own isn't.
    drawing = (
        activations.sampling(cells=cells * V, itemsize=e, truncation=kind, cpu=cpu)
        + (drawn + filled - cells) * V * e
        - freed * cells * V
        for cells, freed in ((drawn, 0), (at_once, 4))
    )
    moments = [
        Item("one block's forward", activations.working_forward(trunk), f"{rows} rows of {trunk.length} tokens"),
        Item("drawing tokens", max(drawing), f"logits at {drawn:,} positions and the sampler's copies{also}"),
    ]
    if sampler.position_rule == "decoupled_confidence":
        tempered = sampler.confidence_temperature != 1.0
        moments.append(
            Item("choosing positions", activations.choosing(cells=block * V, itemsize=e, tempered=tempered),
                 f"confidences at {block:,} positions")
        )  # fmt: skip
    if config.evaluation.position_rule in ("low_confidence", "entropy"):
        moments.append(
            Item(
                "greedy evaluation",
                activations.sampling(cells=block * V, itemsize=e, truncation="none", cpu=cpu),
                f"logits at all {block:,} masked positions of the blocks ({config.evaluation.position_rule})",
            )
        )
    return ProcessMemory(
        name="rollout actor",
        device=device,
        resident=(
            *(_weights(config, model, rank=False) if embedded else _vllm_weights(config, model, device)),
            *_allowances(config, device, rank=False),
        ),
        kept=(),
        moments=tuple(moments),
        after=(),
        host=_host(device),
        mapped=_mapped(config, model, device, on_cpu=embedded),
    )


def _filled(config: RunConfig, rows: int) -> tuple[int, int]:
    """(positions of branched states in one step, at most, and of one row's that are drawn with copies)."""
    sampler = config.rollout.sampler
    C, m, branches = sampler.completion_length, sampler.steps, config.objective.branches(sampler.spec())
    if branches is None:
        return 0, 0
    if isinstance(branches, GreedyBranches):  # every step of every row; at the first all is masked
        return rows * C, 0
    completions = config.run.iterations * config.rollout.prompts_per_iteration * config.rollout.group_size
    above, most = above_mean(m * math.ceil(completions / rows)), 0.0
    for step in range(m):  # of how many rows this is the drawn one
        p = ((step + 1) / m) ** (branches.degree + 1) - (step / m) ** (branches.degree + 1)
        branched = rows * p + above * math.sqrt(rows * p * (1 - p))
        most = max(most, min(branched, rows) * C * (m - step) / m)
    earliest = int(m * (completions + 1) ** (-1 / (branches.degree + 1)))
    of_one_row = math.ceil(C * (m - earliest) / m)
    return max(math.ceil(most), of_one_row), of_one_row


def trajectory_bytes(config: RunConfig, prompt: int) -> int:
    """One group in the object store, at most: every position keeps all the tokens that top-k allows."""
    sampler, G = config.rollout.sampler, config.rollout.group_size
    C = sampler.completion_length
    per_position = 4 + 2 + 2 + 1 + 3 * 4
    kept = sampler.top_k or (256 if sampler.top_p < 1.0 else 0)
    support = C * (8 + 4 * kept) if kept else 0
    choices = 8 * sampler.steps if sampler.position_rule == "decoupled_confidence" else 0
    return G * (C * per_position + support + choices + _branch_bytes(config) + 16) + 4 * prompt


def _branch_bytes(config: RunConfig) -> int:
    """Of one completion's branches, but for their rewards."""
    branches = config.objective.branches(config.rollout.sampler.spec())
    if branches is None:
        return 0
    per_position = 4 if isinstance(branches, GreedyBranches) else 8  # tokens, and log-probs of drawn ones
    return branches.states * (2 + branches.fills * (config.rollout.sampler.completion_length * per_position + 1))


def weight_bytes(config: RunConfig, model: ModelShape) -> int:
    """The base's weights, in the run's dtype or quantized."""
    e = itemsize(config)
    kind = config.model.quantization
    quantized = model.distinct_layers * sum(one.parameters for one in model.maps if one.name != "router") if kind else 0
    return int(quantized * (BYTES_PER_PARAMETER[kind] if kind else 0.0)) + (model.parameters - quantized) * e


def adapter_bytes(config: RunConfig, model: ModelShape) -> int:
    """The adapter in the dtype of the forward, which is what is published."""
    return trained(config, model) * itemsize(config)


def trained(config: RunConfig, model: ModelShape) -> int:
    """Trained parameters."""
    return model.adapter_parameters(config.lora.r, include_head=config.lora.include_head)


def _scoring(config: RunConfig, model: ModelShape, largest: LargestForward) -> int:
    e, V, rows = itemsize(config), model.vocabulary, largest.positions
    cost = config.objective.cost(config.rollout.sampler.spec())
    if cost.vocabulary:
        return activations.scoring_laws(rows=rows, vocabulary=V)
    restricted = cost.recorded and truncation(config) != "none"
    tokens = activations.scoring(rows=rows, vocabulary=V, itemsize=e, restricted=restricted)
    if not largest.candidates:
        return tokens
    tempered = config.rollout.sampler.confidence_temperature != 1.0
    return max(
        tokens + largest.candidates * V * e,
        activations.scoring_positions(
            candidates=largest.candidates, rows=rows, vocabulary=V, itemsize=e, tempered=tempered
        ),
    )


def _scoring_note(largest: LargestForward) -> str:
    also = f" and {largest.candidates:,} candidates" if largest.candidates else ""
    return f"{largest.positions:,} positions{also}, with fp32 copies or gradients"


def _weights(config: RunConfig, model: ModelShape, *, rank: bool) -> list[Item]:
    e, kind = itemsize(config), config.model.quantization
    weights = weight_bytes(config, model)
    says = f"{model.parameters / 1e6:,.1f} M parameters, {kind or config.learner.dtype}"
    items = []
    if rank and config.learner.zero_stage == 3 and config.learner.ranks > 1:
        items.append(Item("base weights", math.ceil(weights / config.learner.ranks), f"{says}, partitioned (ZeRO-3)"))
        live = min(model.parameters, GATHERED_LIVE + max(one.inputs * one.outputs for one in model.maps))
        items.append(Item("gathered weights", live * e, "ZeRO-3 keeps up to 1e9 at once"))
    else:
        items.append(Item("base weights", weights, says))
    if kind:
        largest = max(one.inputs * one.outputs for one in model.maps)
        items.append(Item("one map expanded", largest * e, f"{kind} to {config.learner.dtype}, while it is used"))
    adapter = adapter_bytes(config, model)
    items.append(Item("adapter", adapter, f"LoRA r {config.lora.r}: {trained(config, model) / 1e6:,.2f} M parameters"))
    return items


def _vllm_weights(config: RunConfig, model: ModelShape, device: Device) -> list[Item]:
    settings, e = config.rollout.vllm, itemsize(config)
    of_blocks = model.distinct_layers * sum(one.parameters for one in model.maps if one.name != "router")
    weights = model.parameters * e - (of_blocks * (e - 1) if settings.quantization else 0)
    split = settings.tensor_parallel_size
    note = f"{model.parameters / 1e6:,.1f} M parameters, {settings.quantization or config.learner.dtype}"
    items = [Item("base weights", math.ceil(weights / split), note + (f", 1/{split} of them" if split > 1 else ""))]
    if model.family not in MERGED:
        wide = slot_rank(config.lora.r)
        slots = ADAPTERS * math.ceil(adapter_bytes(config, model) * wide / config.lora.r)
        items.append(Item("slots for adapters", math.ceil(slots / split), f"{ADAPTERS} of rank {wide}"))
    elif device == "cpu":
        items.append(Item("the policy beside", weights + adapter_bytes(config, model), "adapters are merged in it"))
    if device == "cpu":
        items.append(Item("vLLM", VLLM_ALLOWANCE, "measured"))
    return items


def _training_state(config: RunConfig, model: ModelShape) -> list[Item]:
    learner, A = config.learner, trained(config, model)
    stage = learner.zero_stage
    share = math.ceil(A / learner.ranks) if stage > 0 else A
    split = f", 1/{learner.ranks} of it (ZeRO-{stage})" if stage > 0 and learner.ranks > 1 else ""
    grads_split = stage >= 2
    items = [
        Item("gradients", (share if grads_split else A) * 4, "fp32 sums" + (split if grads_split else "")),
        Item("AdamW's moments", share * 8, "two, fp32" + split),
    ]
    if stage > 0:
        items.append(Item("fp32 masters", share * 4, "of the adapter" + split))
    return items


def _bucket(config: RunConfig, model: ModelShape) -> list[Item]:
    """In which DeepSpeed collects gradients from a backward's begin until they are reduced."""
    stage = config.learner.zero_stage
    if stage == 0:
        return []
    # ZeRO-1 stages the fp32 sums, 2 and 3 the dtype of the backward.
    width = 4 if stage == 1 else itemsize(config)
    return [Item("reduce bucket", trained(config, model) * width, "DeepSpeed's, as large as the adapter")]


def _step(config: RunConfig, model: ModelShape) -> Item:
    """After the last backward: what the optimizer step itself needs."""
    A = trained(config, model)
    if config.learner.zero_stage == 0:
        return Item("optimizer step", A * 4, "the gradients in one piece while they are reduced, or square roots, fp32")
    share = math.ceil(A / config.learner.ranks)
    return Item("optimizer step", share * 8, "AdamW's square roots, and what is divided by, fp32")


def _allowances(config: RunConfig, device: Device, *, rank: bool) -> list[Item]:
    if device == "cpu":
        return [Item("Python and libraries", PROCESS_ALLOWANCE, "measured: 0.55 to 0.61 GB")]
    items = [Item("CUDA context and libraries", CUDA_ALLOWANCE, "assumed")]
    if rank and config.learner.ranks > 1:
        items.append(Item("NCCL buffers", NCCL_ALLOWANCE, "assumed"))
    return items


def _host(device: Device) -> tuple[Item, ...]:
    return () if device == "cpu" else (Item("Python and libraries", PROCESS_ALLOWANCE),)


def _mapped(config: RunConfig, model: ModelShape, device: Device, *, on_cpu: bool) -> int:
    """The file's weights. A GPU gets them from there; a process on a CPU computes with them where they are if they have
    the run's dtype and ``on_cpu`` says so."""
    dtype = model.dtype or config.learner.dtype
    if device == "cpu" and (not on_cpu or config.model.quantization or dtype != config.learner.dtype):
        return 0
    return model.parameters * (4 if dtype == "float32" else 2)
