"""Tables of a GPU's results, written by hand."""

from gkd_d2.analysis.benchmark.tables import loss_tables

KEYS = (
    *("forward_ms", "backward_ms", "both_ms", "of_eager", "of_compiled", "of_floor"),
    *("gigabytes_per_second", "extra_memory", "loss_error", "gradient_error"),
)


def test_the_table_says_what_was_not_replayed():
    names = ("eager reference", "compiled reference", "fused")
    values = {name: {key: 1.0 + index for key in KEYS} for index, name in enumerate(names)}
    for name in names:
        values[name]["timed_by"] = "events" if name == "eager reference" else "graph replay"
    values["fused"] |= {"host_forward_ms": 0.125, "host_backward_ms": 0.0625}
    title = {"shapes": "toy", "batch": 1, "dtype": "float32", "layout": "contiguous", "boxes": 1, "weights": "all"}
    title |= {"device": "a GPU", "torch": "2", "feature_megabytes": 1.0, "passes": 9, "floor_ms": 0.5}
    lines = loss_tables({**title, "implementations": values}).splitlines()
    header, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| "))
    cells = {row[0]: dict(zip(header, row)) for row in rows}
    assert cells["fused"]["timed by"] == "graph replay"
    assert (cells["fused"]["host, forward ms"], cells["fused"]["host, backward ms"]) == ("0.125", "0.062")
    assert cells["fused"]["/ compiled"] == "3.000"
    assert cells["eager reference"]["timed by"] == "events"
    floor = cells["floor: 9 passes"]
    assert (floor["both ms"], floor["timed by"], floor["host, forward ms"], floor["/ eager"]) == ("0.500", "", "", "")
