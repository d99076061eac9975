"""Hypothesis strategies for plans and policies, shared by the tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hypothesis import strategies as st

from pdtrim_pl.plan import (
    STAGES,
    Boundary,
    Codec,
    KVRetentionPolicy,
    KVShape,
    ModelRef,
    Part,
    Relation,
    Removal,
    Retention,
    Stage,
    StagePlan,
    Width,
)
from pdtrim_pl.plan.codec import FORMS

RELATIONS: tuple[Relation, ...] = ("nested", "unified", "prefill_only", "free")
BOUNDARIES: tuple[Boundary, ...] = ("prefill", "decode")
TINY_KV = KVShape(num_key_value_heads=2, head_dim=8, dtype="float32")
_Runs = dict[int, tuple[int, ...]]


@st.composite
def plans(
    draw: st.DrawFn, num_blocks: int, relations: Sequence[Relation] = RELATIONS, *, model: ModelRef | None = None,
    parts: Collection[Part] = (),
) -> StagePlan:  # fmt: skip
    """Any plan of a model of `num_blocks` blocks: relation, boundary, merged and untied blocks, history.

    With `parts`, some blocks of a `model` that tells its sizes have lost channels or heads.
    """
    relation = draw(st.sampled_from(relations))
    every = tuple(range(num_blocks))
    decode = every if relation == "prefill_only" else draw(_some_of(every))
    if relation == "unified":
        prefill = decode
    elif relation == "nested":
        more = draw(st.sets(st.sampled_from(every)))
        prefill = tuple(sorted({*decode, *more}))
    else:
        prefill = draw(_some_of(every))
    kept: dict[Stage, tuple[int, ...]] = {"prefill": prefill, "decode": decode}
    used: dict[Stage, list[int]] = {"prefill": sorted({*prefill, *decode}), "decode": list(decode)}  # KV-only ones too
    model = model or ModelRef("tiny", "llama", num_blocks)
    return StagePlan(
        model=model,
        prefill=prefill,
        decode=decode,
        relation=relation,
        boundary=draw(st.sampled_from(BOUNDARIES)),
        merged={stage: draw(_merges(num_blocks, kept[stage])) for stage in STAGES},
        untied={stage: tuple(sorted(draw(st.sets(st.sampled_from(used[stage]))))) for stage in STAGES},
        history=tuple(draw(st.lists(_removals(num_blocks), max_size=4))),
        widths=draw(_widths(model, kept, relation, tuple(parts))) if parts else {},
    )


@st.composite
def _widths(
    draw: st.DrawFn, model: ModelRef, kept: dict[Stage, tuple[int, ...]], relation: Relation, parts: tuple[Part, ...]
) -> dict[Stage, dict[int, Width]]:
    """Often every block of a stage is as wide as any other, so that an export has something to leave out."""
    widths: dict[Stage, dict[int, Width]] = {"prefill": {}, "decode": {}}
    for stage in STAGES:
        if stage == "decode" and relation == "prefill_only":
            continue
        some = kept[stage] if draw(st.booleans()) else draw(_some_of(kept[stage]))
        for block in some:
            width = Width(**{part: draw(_units(model, part)) for part in parts if draw(st.integers(0, 3))})
            widths[stage][block] = width
    if relation in ("nested", "unified"):
        for block in kept["decode"]:
            ours, theirs = (widths[stage].get(block, Width()) for stage in STAGES)
            try:
                widths["decode"][block] = theirs.within(ours)
                StagePlan.full(model).narrow("decode", block, widths["decode"][block])
            except ValueError:  # what both keep may be nothing, or not alike for every KV head
                widths["decode"][block] = ours
        if relation == "unified":
            widths["prefill"] = dict(widths["decode"])
    return widths


@st.composite
def _units(draw: st.DrawFn, model: ModelRef, part: Part) -> tuple[int, ...]:
    """Some channels, or so many query heads of every KV head."""
    units, groups = model.sizes[part], model.kv_heads if part == "heads" else 1
    assert units is not None
    assert groups is not None
    each = draw(st.integers(1, units // groups))
    order = draw(st.randoms(use_true_random=False))
    size = units // groups
    chosen = [group * size + unit for group in range(groups) for unit in order.sample(range(size), each)]
    return tuple(sorted(chosen))


@st.composite
def policies(draw: st.DrawFn, plan: StagePlan, *, kv: KVShape = TINY_KV, codecs: bool = False) -> KVRetentionPolicy:
    """Any policy for `plan`, with codecs where asked for; some blocks have no rule of their own."""
    any_rule = st.builds(Retention.written_as, retentions(), any_codec()) if codecs else retentions()
    rules = draw(st.dictionaries(st.sampled_from(plan.decode), any_rule))
    return KVRetentionPolicy(plan.boundary, kv, rules)


def retentions() -> st.SearchStrategy[Retention]:
    """Any rule, with counts and shares."""
    shares = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)
    amounts = st.integers(min_value=0, max_value=20) | shares
    pairs = st.tuples(amounts, amounts).filter(any)
    return st.just(Retention()) | pairs.map(lambda pair: Retention("first_last", *pair))


@st.composite
def any_codec(draw: st.DrawFn) -> Codec:
    """Any way to write keys and values."""
    keys, values = draw(st.sampled_from(FORMS)), draw(st.sampled_from(FORMS))
    rotate = [draw(st.booleans()) and form != "none" for form in (keys, values)]
    exact = 0 if keys == values == "none" else draw(st.integers(0, 4))
    return Codec(keys, values, *rotate, draw(st.sampled_from((1, 3, 64))), exact)


def _some_of(blocks: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.sampled_from(blocks), min_size=1).map(lambda chosen: tuple(sorted(chosen)))


@st.composite
def _merges(draw: st.DrawFn, num_blocks: int, kept: tuple[int, ...]) -> _Runs:
    """Some kept blocks stand for themselves and the removed ones that follow them."""
    runs: _Runs = {}
    for block, end in zip(kept, (*kept[1:], num_blocks), strict=True):
        if end - block > 1 and draw(st.booleans()):
            runs[block] = tuple(range(block, end))
    return runs


def _removals(num_blocks: int) -> st.SearchStrategy[Removal]:
    return st.builds(
        Removal,
        round=st.integers(min_value=0, max_value=5),
        stage=st.sampled_from(STAGES),
        action=st.sampled_from(["drop", "merge"]),
        block=st.integers(min_value=0, max_value=num_blocks - 1),
        criterion=st.sampled_from(["cosine", "greedy_kl", "manual"]),
        score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    )
