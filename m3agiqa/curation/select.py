"""The rules of a recipe as SQL, in the order of its sections; every tie is decided by the id."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from m3agiqa.aspects import Aspect
from m3agiqa.curation.duplicates import Vectors, alike, near_hashes
from m3agiqa.curation.expressions import Expression, check_types, first, quoted
from m3agiqa.curation.funnel import Funnel
from m3agiqa.curation.recipe import Recipe
from m3agiqa.curation.rows import Scores
from m3agiqa.curation.sample import allocate
from m3agiqa.errors import UserError
from m3agiqa.records import ASPECT_COLUMNS, Status

COMPOSITE = "composite"
SPLIT = "split"
_SCORED = {f"{aspect}_{suffix}" for aspect in Aspect for suffix in ASPECT_COLUMNS}
_DEFAULT_COMPOSITES = tuple(f"{aspect}_{suffix}" for suffix in ("mos", "rating_score") for aspect in Aspect)
# The best first. A row without a composite is never preferred to one that has it.
_ORDER = "composite DESC NULLS LAST, id"

Hasher = Callable[[pa.Table], pa.Table]
"""Rows (id, image) -> (id, hash: uint64, null where the image cannot be read)."""


@dataclass(frozen=True)
class Plan:
    """A recipe whose expressions have all been read and checked against the columns.

    Attributes:
        composite: None where the scores have that column already, or no rule needs it and no weights were given.
        ordered, parted: whether there is a column composite, or split, either way.
        where, top, within, strata: as in the recipe. by: of pairs.
    """

    recipe: Recipe
    composite: Expression | None
    ordered: bool
    parted: bool
    where: tuple[tuple[str, Expression], ...]
    top: tuple[tuple[str, Expression, float], ...]
    within: tuple[Expression, ...]
    strata: tuple[Expression, ...]
    by: Expression | None


def plan(scores: Scores, recipe: Recipe) -> Plan:
    """Reads all expressions of a recipe, and makes the view `scored`: the rows with their composite.

    Raises:
        UserError: for what is no expression, an unknown column, scores without the aspect that is asked for, and
            rules that the scores cannot serve.
    """
    for taken, flag, wanted in (
        (COMPOSITE, "composite.weights", recipe.composite.weights),
        (SPLIT, "split.validation", recipe.split.validation),
    ):
        if wanted and scores.has(taken):
            raise UserError(flag, f"{scores.uri} has a column {taken!r} already", "leave it out, and that one is used")
    weights = _weights(scores, recipe)
    parts = [(text, scores.parse(text, "composite.weights"), weight) for text, weight in weights.items()]

    def read(text: str, flag: str) -> Expression:
        return scores.parse(text, flag, (COMPOSITE,))

    where = tuple((text, read(text, "rows.where")) for text in recipe.rows.where)
    top = tuple((text, read(text, "quantile.top"), share) for text, share in recipe.quantile.top.items())
    within = tuple((text, read(text, "quantile.within")) for text in recipe.quantile.within)
    strata = tuple((text, read(text, "sample.strata")) for text in recipe.sample.strata)
    by = None if recipe.pairs.margin is None else read(recipe.pairs.by, "pairs.by")
    values = [(text, part) for text, part, _ in (*parts, *top)] + ([(recipe.pairs.by, by)] if by else [])
    _check_scored(scores, [*where, *values, *within, *strata])
    composite = _composite(scores, parts)
    added = f", {composite.sql} AS {COMPOSITE}" if composite else ""
    scores.con.execute(f"CREATE TEMP VIEW scored AS SELECT *{added} FROM rows")
    for text, condition in where:
        check_types(scores.con, text, condition.sql, "scored", "BOOLEAN")
    for text, value in values:
        check_types(scores.con, text, _number(value), "scored")
    for text, group in (*within, *strata):
        check_types(scores.con, text, group.sql, "scored")
    if recipe.duplicates.similarity is not None and f"{recipe.duplicates.aspect}_states" not in scores.states:
        rule = f"needs captured states of {recipe.duplicates.aspect}, which {scores.uri} does not hold"
        raise UserError("duplicates.similarity", rule, "curate a folder that m3agiqa capture wrote")
    ordered = composite is not None or scores.has(COMPOSITE)
    parted = bool(recipe.split.validation) or scores.has(SPLIT)
    groups, strata_of = (tuple(group for _, group in named) for named in (within, strata))
    return Plan(recipe, composite, ordered, parted, where, top, groups, strata_of, by)


def select(scores: Scores, plan: Plan, hasher: Hasher) -> Funnel:
    """Applies the rules.

    Args:
        hasher: called once, and only if `duplicates.distance` is set.

    Raises:
        UserError: if a rule leaves nothing.
    """
    recipe, funnel = plan.recipe, Funnel(scores.con, scores.uri)
    funnel.start(_needed(plan), _conditions(plan), "scored")
    if recipe.duplicates.exact:
        funnel.drop("duplicates.exact", _beyond(funnel, 1, "image_sha256", "image_sha256 IS NOT NULL"))
    if recipe.duplicates.distance is not None:
        _drop_near(funnel, recipe.duplicates.distance, hasher)
    if recipe.duplicates.similarity is not None:
        vectors = Vectors(scores.con, f"{recipe.duplicates.aspect}_states", f"{recipe.duplicates.aspect}_tokens")
        ids = alike(vectors, recipe.duplicates.similarity, funnel.kept("id, composite"), _ORDER)
        _drop_ids(funnel, f"duplicates.similarity: {recipe.duplicates.similarity:g}", ids)
    for place, (text, _, share) in enumerate(plan.top):
        funnel.drop(f"quantile.top: {text}: {share:g}", _below_quantile(funnel, f"top_{place}", share))
    if recipe.best.per_prompt is not None:
        funnel.drop("best.per_prompt", _beyond(funnel, recipe.best.per_prompt, "prompt_key"))
    if recipe.best.top is not None:
        funnel.drop("best.top", _beyond(funnel, recipe.best.top, "1"))
    if recipe.sample.size is not None:
        _sample(funnel, recipe)
    if recipe.split.validation:
        _split(funnel, recipe)
    return funnel


def _weights(scores: Scores, recipe: Recipe) -> dict[str, float]:
    """The weights of the composite; those of the default where none are given, but a rule needs it."""
    given = recipe.composite.weights
    if given and sum(given.values()) == 0:
        raise UserError("composite.weights", "sum to 0", "give weights whose sum is not 0: they are divided by it")
    texts = (*recipe.rows.where, *recipe.quantile.top, *recipe.quantile.within, *recipe.sample.strata)
    named = any(COMPOSITE in text.lower() for text in texts)
    duplicates, best, pairs = recipe.duplicates, recipe.best, recipe.pairs
    orders = (best.per_prompt, best.top, duplicates.distance, duplicates.similarity, pairs.margin)
    if given or scores.has(COMPOSITE) or not (named or duplicates.exact or any(value is not None for value in orders)):
        return given
    has = scores.has_values([name for name in _DEFAULT_COMPOSITES if name in scores.schema.names])
    chosen = next((name for name, some in has.items() if some), None)
    if chosen is None:
        raise UserError(scores.uri, "has no scores to order rows by", "give composite.weights")
    return {chosen: 1.0}


def _composite(scores: Scores, parts: list[tuple[str, Expression, float]]) -> Expression | None:
    if not parts:
        return None
    for text, part, _ in parts:
        check_types(scores.con, text, _number(part), "rows")
    total = sum(weight for _, _, weight in parts)
    terms = " + ".join(f"{_number(part)} * CAST({weight!r} AS DOUBLE)" for _, part, weight in parts)
    return Expression(f"(({terms}) / CAST({total!r} AS DOUBLE))", ())


def _number(expression: Expression) -> str:
    return f"CAST({expression.sql} AS DOUBLE)"


def _check_scored(scores: Scores, named: list[tuple[str, Expression]]) -> None:
    """Refuses expressions over a score that no row has: they would drop every row, or none, for no good reason."""
    wanted = sorted({column for _, expression in named for column in expression.columns} & _SCORED)
    for column, some in scores.has_values(wanted).items():
        if not some:
            text = next(text for text, expression in named if column in expression.columns)
            why = "score with a predictor" if "_mos" in column else "score this aspect"
            raise UserError(repr(text), f"{column} is null in every row of {scores.uri}", f"{why}, or leave it out")


def _conditions(plan: Plan) -> list[tuple[str, str]]:
    """The rules of single rows: name -> SQL."""
    size = plan.recipe.size
    sides = (
        ("min_side", size.min_side, "least(width, height) >= {}"),
        ("max_side", size.max_side, "greatest(width, height) <= {}"),
        ("min_aspect", size.min_aspect, "width / height >= {}"),
        ("max_aspect", size.max_aspect, "width / height <= {}"),
    )
    return [
        ("status", f"status = '{Status.OK}'"),
        *((f"where: {text}", expression.sql) for text, expression in plan.where),
        *((f"size.{name}: {limit:g}", sql.format(limit)) for name, limit, sql in sides if limit is not None),
    ]


def _needed(plan: Plan) -> dict[str, str]:
    """What the later rules need of each row: name -> SQL; as little as can be, as it is held for all rows."""
    recipe = plan.recipe
    columns = {}
    if plan.ordered:
        columns[COMPOSITE] = f"CAST({COMPOSITE} AS DOUBLE)"
    if recipe.duplicates.exact:
        columns["image_sha256"] = "image_sha256"
    if recipe.duplicates.distance is not None:
        columns["image"] = "image"
    if recipe.best.per_prompt is not None or recipe.split.validation or plan.by is not None:
        # A row without a prompt is a group of its own.
        columns["prompt_key"] = "md5_number(CASE WHEN prompt IS NULL THEN 'i' || id ELSE 'p' || prompt END)"
    columns |= {f"top_{place}": _number(e) for place, (_, e, _) in enumerate(plan.top)}
    if plan.top:
        columns["within"] = _group(plan.within)
    if recipe.sample.size is not None:
        columns["stratum"] = _group(plan.strata)
    if plan.by is not None:
        columns["preference"] = _number(plan.by)
        if plan.parted and not recipe.split.validation:
            columns[SPLIT] = f"CAST({SPLIT} AS VARCHAR)"
    return columns


def _group(expressions: tuple[Expression, ...]) -> str:
    values = ", ".join(f"CAST({expression.sql} AS VARCHAR)" for expression in expressions)
    return f"CAST(to_json([{values}]::VARCHAR[]) AS VARCHAR)"


def _beyond(funnel: Funnel, most: int, group: str, condition: str = "true") -> str:
    """The rows after the first so many of each group."""
    ranked = f"row_number() OVER (PARTITION BY {group} ORDER BY {_ORDER})"
    return f"(SELECT rowid, {ranked} AS place FROM {funnel.kept()} WHERE {condition}) WHERE place > {most}"


def _below_quantile(funnel: Funnel, column: str, share: float) -> str:
    """The rows below their group's quantile; those that are equal to it stay, those without a value go."""
    # From the top, so that the share itself is the place, without the rounding of 1 - share.
    edges = f"SELECT within, -quantile_disc(-{column}, {share!r}) AS edge FROM {funnel.kept()} GROUP BY within"
    return (
        f"(SELECT one.rowid, {column} >= edge AS stays FROM {funnel.kept()} AS one JOIN ({edges}) USING (within)) "
        "WHERE NOT coalesce(stays, false)"
    )


def _drop_near(funnel: Funnel, distance: int, hasher: Hasher) -> None:
    hashes = hasher(funnel.con.sql(f"FROM {funnel.kept('id, image')} ORDER BY id").to_arrow_table())
    if missing := hashes["hash"].null_count:
        funnel.notes.append(f"{missing:,} images could not be read and are compared with none")
    funnel.con.register("hashes", hashes)
    funnel.con.execute("CREATE TABLE hashed AS SELECT * FROM hashes")
    funnel.con.unregister("hashes")
    kept = f"(SELECT id, composite, hash FROM {funnel.kept()} JOIN hashed USING (id) WHERE hash IS NOT NULL)"
    ordered = funnel.con.sql(f"SELECT id, hash FROM {kept} ORDER BY {_ORDER}").to_arrow_table()
    _drop_ids(funnel, f"duplicates.distance: {distance}", near_hashes(ordered, distance))


def _drop_ids(funnel: Funnel, rule: str, ids: pa.Array) -> None:
    funnel.con.register("gone", pa.table({"id": ids}))
    funnel.drop(rule, "work WHERE id IN (SELECT id FROM gone)")
    funnel.con.unregister("gone")


def _sample(funnel: Funnel, recipe: Recipe) -> None:
    size = recipe.sample.size
    assert size is not None
    counts = funnel.con.execute(f"SELECT stratum, count(*) FROM {funnel.kept()} GROUP BY 1 ORDER BY 1").fetchall()
    shares = allocate([count for _, count in counts], size, equal=recipe.sample.shares == "equal")
    funnel.con.register("shares", pa.table({"stratum": [name for name, _ in counts], "share": pa.array(shares)}))
    chance = f"md5_number('{recipe.sample.seed}/' || id)"
    ranked = f"row_number() OVER (PARTITION BY stratum ORDER BY {chance}, id)"
    places = f"(SELECT rowid, stratum, {ranked} AS place FROM {funnel.kept()})"
    funnel.drop(
        f"sample.size: {size}",
        f"(SELECT one.rowid, place > share AS over FROM {places} AS one JOIN shares USING (stratum)) WHERE over",
    )
    funnel.con.unregister("shares")


def _split(funnel: Funnel, recipe: Recipe) -> None:
    """Marks whole prompts, in an order that chance decides, until they hold the share of the rows."""
    share, seed = recipe.split.validation, recipe.split.seed
    wanted = share * funnel.steps[-1].left
    chance = f"md5_number('{seed}/' || CAST(prompt_key AS VARCHAR))"
    prompts = f"SELECT prompt_key, count(*) AS n FROM {funnel.kept()} GROUP BY 1"
    before = f"sum(n) OVER (ORDER BY {chance}, prompt_key) - n"
    validation = (
        f"SELECT prompt_key FROM (SELECT prompt_key, {before} AS before FROM ({prompts})) WHERE before < {wanted!r}"
    )
    funnel.con.execute(f"ALTER TABLE work ADD COLUMN {quoted(SPLIT)} VARCHAR DEFAULT 'train'")
    funnel.con.execute(
        f"UPDATE work SET {quoted(SPLIT)} = 'val' WHERE dropped IS NULL AND prompt_key IN ({validation})"
    )
    if first(funnel.con, f"SELECT count(DISTINCT {quoted(SPLIT)}) FROM work WHERE dropped IS NULL") != (2,):
        rule = "leaves no prompt to train on: all rows that are kept are of too few prompts"
        raise UserError(f"split.validation={share:g}", rule, "keep more prompts, or make no split")
