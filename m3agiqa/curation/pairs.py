"""Preference pairs: from one prompt, one row that is chosen and one that is rejected."""

from m3agiqa.curation.funnel import Funnel


def pairs_query(funnel: Funnel, margin: float, most: int, *, split: bool) -> str:
    """SQL of the pairs over the kept rows of `work`, which holds `preference` and `prompt_key`.

    The best is paired with the worst, the second best with the second worst, and so on: no image is in two pairs.
    The columns: prompt, the ids, the images and the values that were compared (`chosen`, `rejected`), and `split`.

    Args:
        margin: least difference of the two. most: pairs of a prompt, in each part.
        split: whether `work` holds `split`, too: both rows of a pair are of one part.
    """
    # Without a prompt there is nothing that both are an answer to: such a row is alone in its group.
    group = "prompt_key, split" if split else "prompt_key"
    best = f"row_number() OVER (PARTITION BY {group} ORDER BY preference DESC, id)"
    worst = f"row_number() OVER (PARTITION BY {group} ORDER BY preference, id DESC)"
    ranked = f"(SELECT *, {best} AS best, {worst} AS worst FROM {funnel.kept()} WHERE preference IS NOT NULL)"
    part, same = (", one.split AS split", "AND one.split IS NOT DISTINCT FROM other.split ") if split else ("", "")
    matched = (
        f"SELECT one.id AS chosen_id, other.id AS rejected_id, one.preference AS chosen, "
        f"other.preference AS rejected{part} FROM {ranked} AS one JOIN {ranked} AS other "
        f"ON one.prompt_key = other.prompt_key AND one.best = other.worst {same}"
        f"WHERE one.best <= {most} AND one.preference > other.preference "
        f"AND one.preference - other.preference >= {margin!r}"
    )
    return (
        "SELECT a.prompt AS prompt, chosen_id, rejected_id, a.image AS chosen_image, b.image AS rejected_image, "
        f"chosen, rejected{', p.split' if split else ''} FROM ({matched}) AS p "
        "JOIN rows AS a ON a.id = chosen_id JOIN rows AS b ON b.id = rejected_id ORDER BY chosen_id"
    )
