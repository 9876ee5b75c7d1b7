"""Plans, what a network says of its groups, and plans that do not fit it."""

import blocks
import pytest

from diffjax.nn.groups import FRAMES, ROWS
from diffjax.video import grouping
from diffjax.video.grouping import Plan


@pytest.mark.fast
def test_groups_are_listed_in_order_with_their_sizes():
    found = grouping.groups_of(blocks.network, *blocks.shapes())
    names = [group.name for group in found]
    assert names == ["down/0/spatial", "down/0/spatial/tokens", "down/0/temporal", "down/0/temporal", "up"]
    assert [(group.axis.name, group.length) for group in found] == [
        ("frames", 7), ("tokens", 60), ("rows", 10), ("rows", 10), ("frames", 7),
    ]  # fmt: skip
    assert found[0].operators == ("resnet", "attention") and found[2].operators == ()
    whole, numbers = 7 * 10 * 6 * 16 * 4, 7 * 16 * 4
    assert (found[0].input_bytes, found[0].output_bytes) == (whole + numbers, whole)
    assert (found[4].input_bytes, found[4].output_bytes) == (2 * whole, 4 * whole)


def test_a_group_has_the_count_of_the_first_pattern_or_of_its_axis():
    plan = Plan(frames=3, groups={"up_blocks/3/*": 14, "up_blocks/*": 5})
    sizes = [plan.size(name, FRAMES, 14) for name in ("up_blocks/3/a/spatial", "up_blocks/0/a", "conv_in")]
    assert sizes == [1, 3, 5]  # ceil(14 / 14), ceil(14 / 5), ceil(14 / 3)
    assert plan.size("temporal", ROWS, 72) == 72


def test_plans_survive_json():
    plan = Plan(14, 9, 4, {"up/*": 28})
    assert grouping.loads(plan.dumps()) == plan
    assert grouping.loads('{"rows": 2}') == Plan(rows=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"frame": 2}', "unknown entry 'frame'.*'frames'"),
        ("{", "no JSON"),
        ("[1]", "expected an object"),
        ('{"groups": 3}', "expected an object"),
        ('{"rows": 0}', "found 0 slices for rows"),
        ('{"groups": {"up": 1.5}}', "found 1.5 slices for up"),
    ],
)
def test_bad_plans_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        grouping.loads(text)


def test_a_plan_for_a_group_that_is_not_there_is_refused():
    found = grouping.groups_of(blocks.network, *blocks.shapes())
    grouping.check(Plan(groups={"down/*": 2, "up": 3}), found)
    with pytest.raises(ValueError, match="'down/1/\\*'.*did you mean 'down/0/"):
        grouping.check(Plan(groups={"down/1/*": 2}), found)
