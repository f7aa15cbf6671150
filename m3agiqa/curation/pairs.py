"""Preference pairs: from one prompt, one row that is chosen and one that is rejected."""

from m3agiqa.curation.funnel import Funnel

COLUMNS = ("prompt", "chosen_id", "rejected_id", "chosen_image", "rejected_image", "chosen", "rejected")
"""Of `pairs.parquet`; `chosen` and `rejected` are the values that were compared. Then `split`, where there is one."""


def pairs_query(funnel: Funnel, margin: float, most: int, *, split: bool) -> str:
    """SQL of the pairs over the kept rows of `work`, which holds `preference` and `prompt_key`.

    The best is paired with the worst, the second best with the second worst, and so on: no image is in two pairs.

    Args:
        margin: least difference of the two. most: pairs of a prompt.
    """
    # Without a prompt there is nothing that both are an answer to: such a row is alone in its group.
    best = "row_number() OVER (PARTITION BY prompt_key ORDER BY preference DESC, id)"
    worst = "row_number() OVER (PARTITION BY prompt_key ORDER BY preference, id DESC)"
    ranked = f"(SELECT *, {best} AS best, {worst} AS worst FROM {funnel.kept()} WHERE preference IS NOT NULL)"
    part = ", one.split AS split" if split else ""
    matched = (
        f"SELECT one.id AS chosen_id, other.id AS rejected_id, one.preference AS chosen, "
        f"other.preference AS rejected{part} FROM {ranked} AS one JOIN {ranked} AS other "
        "ON one.prompt_key = other.prompt_key AND one.best = other.worst "
        f"WHERE one.best <= {most} AND one.preference > other.preference "
        f"AND one.preference - other.preference >= {margin!r}"
    )
    return (
        "SELECT a.prompt AS prompt, chosen_id, rejected_id, a.image AS chosen_image, b.image AS rejected_image, "
        f"chosen, rejected{', p.split' if split else ''} FROM ({matched}) AS p "
        "JOIN rows AS a ON a.id = chosen_id JOIN rows AS b ON b.id = rejected_id ORDER BY chosen_id"
    )
