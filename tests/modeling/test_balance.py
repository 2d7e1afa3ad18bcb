"""Weights by the ratio of gradients: samples, medians, ramp, cap and state, worked by hand."""

import json
import math

import pytest

from gkd_d2.modeling.balance import Balance
from gkd_d2.modeling.measure import TermReport, pooled


def report(detection, factor=1.0, boxes=2, **norms):
    """One level, or as many as there are numbers."""

    def levels(numbers):
        return {f"p{3 + i}": n for i, n in enumerate(numbers if isinstance(numbers, tuple) else (numbers,))}

    by_term = {(term, level): n for term, numbers in norms.items() for level, n in levels(numbers).items()}
    return TermReport(values=dict(by_term), norms=by_term, detection=levels(detection), boxes=boxes, factor=factor)


def taken(balance, *reports):
    for one in reports:
        balance.take(one)
    return balance


@pytest.mark.parametrize(
    ("detections", "median"),
    [
        # Of a box gradient of 1: A / B is A itself.
        ((5.0,), 5.0),
        ((8.0, 1.0, 2.0), 2.0),
        # Of an even number the geometric mean of the middle two.
        ((100.0, 1.0, 8.0, 2.0), 4.0),
    ],
)
def test_the_weight_is_the_ratio_times_the_median(detections, median):
    balance = taken(Balance({"box": 0.5}, len(detections)), *(report(a, box=1.0) for a in detections))
    assert balance.frozen and balance.taken == len(detections)
    assert balance.weights() == balance.factors() == {"box": pytest.approx(0.5 * median)}


def test_each_loss_has_samples_of_its_own():
    """What is 0 or not finite counts for none, and of a batch without objects nothing does."""
    bad = [report(a, box=1.0, image=1.0) for a in (0.0, math.inf, math.nan)]
    batches = [
        report(2.0, box=1.0, image=4.0),
        report(1.0, boxes=0, box=0.0, image=100.0),
        report(1.0, box=0.0, image=2.0),
        report(6.0, box=math.nan, image=math.inf),
        *bad,
        report(8.0, box=1.0, image=2.0),
    ]
    balance = taken(Balance({"box": 1.0, "image": 1.0}, len(batches)), *batches)
    assert balance.weights() == {"box": pytest.approx(4.0), "image": pytest.approx(0.5)}
    assert balance.taken == 8 and balance.frozen
    assert [len(samples) for samples in balance.state_dict()["samples"].values()] == [2, 3]


def test_levels_and_parts_are_one_gradient():
    """|(3, 4)| = 5 and |(5, 12)| = 13 in one part; of two equal parts the mean loss has 1 / sqrt(2) of each."""
    one = report((5.0, 12.0), box=(3.0, 4.0))
    assert taken(Balance({"box": 1.0}, 1), one).weights() == {"box": pytest.approx(13 / 5)}
    other = report((0.0, 0.0), box=(6.0, 8.0), boxes=3)
    both = pooled([one, other])
    assert both.detection_norm == pytest.approx(13 / 2)
    assert both.norm("box") == pytest.approx(math.hypot(5, 10) / 2)
    assert both.values == {("box", "p3"): 4.5, ("box", "p4"): 6.0} and both.boxes == 5
    # Of parts of parts, as in several processes that accumulate.
    whole = pooled([both, pooled([one, one])])
    assert whole.detection_norm == pytest.approx(math.hypot(13, 0, 13, 13) / 4)
    assert whole.norm("box") == pytest.approx(math.hypot(5, 10, 5, 5) / 4)


def test_factors_ramp_up_and_stay():
    balance = Balance({"box": 0.5, "image": 1.0}, 4)
    assert balance.factors() == {"box": 0.0, "image": 0.0}
    seen = []
    # Before its first sample a loss has no factor, whatever has one already.
    for batch in (report(4.0, box=1.0, image=0.0), *(report(4.0, box=1.0, image=2.0) for _ in range(3))):
        balance.take(batch)
        seen.append(balance.factors())
        assert balance.frozen == (len(seen) == 4)
    assert seen == [{"box": 0.5 * n, "image": 0.0 if n == 1 else 0.5 * n} for n in (1, 2, 3, 4)]


def test_a_warm_up_is_no_part_of_a_sample():
    """The loss at weight 1 has a gradient of 2; the warm-up leaves an eighth of it."""
    assert taken(Balance({"box": 1.0}, 1), report(4.0, factor=0.125, box=0.25)).weights() == {"box": 2.0}


def test_a_loss_without_a_sample_is_named():
    balance = taken(Balance({"box": 1.0, "image": 1.0}, 2), *(report(4.0, box=0.0, image=1.0) for _ in range(2)))
    assert balance.without_sample() == ["box"]
    assert balance.factors() == {"box": 0.0, "image": 4.0}
    assert list(balance.spread()) == ["image"]


def test_the_spread_is_that_of_the_ratios():
    """Of B / A from 1 to 11 a tenth lies below 2, and as much above 10."""
    balance = taken(Balance({"box": 1.0}, 11), *(report(1.0, box=float(b)) for b in range(1, 12)))
    assert balance.spread() == {"box": (pytest.approx(2.0), pytest.approx(10.0))}


def test_the_cap_holds_until_the_ratios_fall():
    balance = taken(Balance({"box": 0.5, "image": 1.0}, 1, limit=3.0), report(4.0, box=1.0, image=2.0))
    weights = {"box": 2.0, "image": 2.0}
    assert balance.weights() == balance.factors() == weights
    assert balance.cap(report(4.0, box=1.0, image=2.0)) is None
    # 2 * 4 / 4 + 2 * 8 / 4
    above = report(4.0, box=4.0, image=8.0)
    assert balance.cap(above) == pytest.approx(6.0)
    assert balance.factors() == {"box": 1.0, "image": 1.0} and balance.weights() == weights
    capped = above.times(balance.factors())
    assert (capped.norm("box") + capped.norm("image")) / capped.detection_norm == pytest.approx(3.0)
    # It is measured at weight 1, and not by the factors that the cap has left.
    assert balance.cap(above) == pytest.approx(6.0)
    assert balance.factors() == {"box": 1.0, "image": 1.0}
    # A batch that says nothing changes nothing.
    for batch in (report(0.0, box=1.0, image=1.0), report(math.inf, box=1.0, image=1.0)):
        assert balance.cap(batch) is None and balance.factors() == {"box": 1.0, "image": 1.0}
    for wrong in (math.inf, math.nan):
        assert balance.cap(report(4.0, box=wrong, image=1.0)) is None
        assert balance.factors() == {"box": 1.0, "image": 1.0}
    assert balance.cap(report(4.0, box=1.0, image=2.0)) is None
    assert balance.factors() == weights


@pytest.mark.parametrize("batches", [0, 2, 3])
def test_a_state_goes_on_as_if_nothing_had_been(batches):
    """Through JSON, which keeps every bit of a number: the state holds nothing but numbers, lists and strings."""
    reports = [report(4.0 + n / 3, box=1.0 + n / 7, image=2.0) for n in range(3)]
    whole = taken(Balance({"box": 0.5, "image": 1.0}, 3, limit=1.0), *reports[:batches])
    if whole.frozen:
        assert whole.cap(reports[0]) > 1.0
    other = Balance({"box": 0.5, "image": 1.0}, 3, limit=1.0)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for balance in (whole, other):
        taken(balance, *reports[batches:])
    assert other.state_dict() == whole.state_dict()
    assert other.factors() == whole.factors() and other.frozen
    # What is taken later is no part of a state that was handed out.
    state = other.state_dict()
    taken(other, reports[0])
    assert len(state["samples"]["box"]) == 3


def test_another_ratio_changes_the_weight_and_no_sample():
    reports = report(4.0, box=1.0, image=2.0), report(9.0, box=1.0, image=1.0)
    before = taken(Balance({"box": 0.5, "image": 1.0}, 2), *reports)
    after = Balance({"box": 0.25}, 2)
    after.load_state_dict(before.state_dict())
    assert after.frozen and after.weights() == {"box": pytest.approx(0.25 * 6.0)}
    assert list(after.state_dict()["samples"]) == ["box"]


def test_a_loss_that_was_not_calibrated_is_refused():
    before = Balance({"box": 0.5}, 2)
    after = Balance({"box": 0.5, "image": 1.0}, 2)
    # Of a run that has taken no batch there is nothing to go on with.
    after.load_state_dict(before.state_dict())
    taken(after, *(report(4.0, box=1.0, image=2.0) for _ in range(2)))
    assert after.weights() == {"box": 2.0, "image": 2.0}
    taken(before, report(4.0, box=1.0))
    with pytest.raises(ValueError, match="were calibrated without the image loss: set GKD.RATIOS.IMAGE to 0, or start"):
        after.load_state_dict(before.state_dict())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"iters": 0}, "GKD.BALANCE_ITERS is 0, but must be >= 1"),
        ({"iters": 1, "limit": 0.0}, "GKD.BALANCE_MAX is 0.0, but must be > 0"),
        ({"iters": 1, "limit": math.nan}, "GKD.BALANCE_MAX is nan, but must be > 0"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Balance({"box": 1.0}, **options)
