"""What is read from the folders of runs."""

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from gkd_d2.analysis.runs import Run, find_runs, shared_dataset


def test_a_resumed_runs_later_rows_win(make_run, evaluated_config):
    run = make_run(
        "run",
        evaluated_config(),
        [
            {"iteration": 19, "total_loss": 5.0, "loss_cls": 3.0},
            {"iteration": 39, "total_loss": 4.0, "loss_cls": 2.0, "bbox/AP": 9.0},
            {"iteration": 40, "bbox/AP": 7.0, "bbox/AP50": 20.0, "bbox/AP-Car": 7.0},
            # Resumed from iteration 20.
            {"iteration": 39, "total_loss": 3.0, "loss_cls": 1.0},
            {"iteration": 40, "bbox/AP": 11.0, "bbox/AP50": 30.0, "kitti/AP_moderate": 8.0},
            {"iteration": 59, "total_loss": 2.5, "loss_cls": 0.5, "loss_box_reg": 2.0, "loss_bmfi_attention": 0.0},
        ],
    )
    assert run.curve("total_loss") == {19: 5.0, 39: 3.0, 59: 2.5}
    # What the resumed run did not write again stays.
    assert run.curve("bbox/AP") == {39: 9.0, 40: 11.0}
    assert run.metrics("val") == {"bbox/AP": 11.0, "bbox/AP50": 30.0, "bbox/AP-Car": 7.0, "kitti/AP_moderate": 8.0}
    assert run.iterations() == 60
    assert run.losses() == ["total_loss", "loss_box_reg", "loss_cls"]


def test_a_run_of_before_several_methods_is_read(make_run, distiller_config):
    cfg = distiller_config("retinanet")
    cfg.GKD.METHOD = "pkd"
    run = make_run("run", cfg, [])
    path = run.folder / "config.yaml"
    assert "  METHODS: []\n" in path.read_text()
    path.write_text(path.read_text().replace("  METHODS: []\n", ""))
    assert run.distilled and run.config.GKD.METHODS == [] and run.config.GKD.METHOD == "pkd"


def test_several_datasets_have_their_own_metrics(make_run, evaluated_config):
    rows = [{"iteration": 9, "a/bbox/AP": 1.0, "b/bbox/AP": 2.0, "b/bbox/AP50": 3.0, "total_loss": 1.0}]
    run = make_run("both", evaluated_config("a", "b"), rows)
    assert run.metrics("a") == {"bbox/AP": 1.0}
    assert run.metrics("b") == {"bbox/AP": 2.0, "bbox/AP50": 3.0}
    single = make_run("single", evaluated_config("b"), [{"iteration": 9, "bbox/AP": 5.0}])
    other = make_run("other", evaluated_config("c"), [])
    assert shared_dataset([run, single]) == "b"
    with pytest.raises(ValueError, match="all evaluated on a, b: choose one of them by --dataset"):
        shared_dataset([run])
    with pytest.raises(ValueError, match="no dataset that all runs .*both: a, b; .*other: c"):
        shared_dataset([run, other])
    with pytest.raises(ValueError, match="single is evaluated on b, not on a"):
        single.metrics("a")


def test_metrics_of_averaged_weights(make_run, evaluated_config):
    row = {"iteration": 9, "bbox/AP": 1.0, "bbox_EMA/AP": 2.0, "kitti/AP_moderate": 3.0, "kitti_EMA/AP_moderate": 4.0}
    # Its own are not those of the augmented detections.
    run = make_run("one", evaluated_config("val"), [row | {"bbox_TTA/AP": 5.0}])
    assert run.metrics("val") == {name: value for name, value in row.items() if name != "iteration"}
    row = {"iteration": 9, "a/bbox/AP": 1.0, "a_EMA/bbox/AP": 2.0, "b/bbox/AP": 3.0, "b_EMA/bbox/AP": 4.0}
    run = make_run("two", evaluated_config("a", "b"), [row])
    assert run.metrics("a") == {"bbox/AP": 1.0, "bbox_EMA/AP": 2.0}
    assert run.metrics("b") == {"bbox/AP": 3.0, "bbox_EMA/AP": 4.0}


def test_what_a_folder_lacks_is_said_by_its_name(make_run, tmp_path, evaluated_config):
    run = make_run("untested", evaluated_config(), [{"iteration": 19, "total_loss": 5.0}])
    with pytest.raises(ValueError, match=r"untested was never evaluated: its metrics.json holds no bbox/AP"):
        run.metrics("val")
    (run.folder / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="untested holds no metrics.json: nothing was trained there"):
        Run("again", run.folder).metrics("val")
    (run.folder / "config.yaml").write_text("MODEL: {NO_SUCH_KEY: 1}\n")
    with pytest.raises(ValueError, match="untested.config.yaml: .*NO_SUCH_KEY"):
        _ = Run("again", run.folder).config
    with pytest.raises(FileNotFoundError, match="nowhere holds no config.yaml"):
        _ = Run("nowhere", tmp_path / "nowhere").config


def test_runs_are_called_by_what_distinguishes_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [tmp_path / "out/teachers/frcnn", tmp_path / "out/baselines/frcnn", tmp_path / "out/gkd"]
    assert [run.name for run in find_runs(folders)] == ["teachers/frcnn", "baselines/frcnn", "gkd"]
    assert [run.name for run in find_runs([folders[0].relative_to(tmp_path)])] == ["frcnn"]


def test_damaged_lines_are_left_out_with_one_warning(make_run, caplog, evaluated_config):
    run = make_run("damaged", evaluated_config(), [])
    whole = [b'{"iteration": 19, "total_loss": 5.0}', b'{"iteration": 39, "bbox/AP": 7.0}']
    # Cut by a full disk; ended by a resume; filled with zeros by a power cut; not of this file.
    bad = [b'{"iteration": 25, "total_l', b'{"iteration": 2{"iteration": 9}', bytes(40), b"\xff", b"[1]", b'{"a": 1}']
    bad += [b"[" * 100_000, b'{"iteration": 39, "bbox/AP": [1]}', b'{"iteration": 39, "bbox/AP": null}']
    (run.folder / "metrics.json").write_bytes(b"\n".join([whole[0], *bad, whole[1]]))
    assert run.history == {19: {"total_loss": 5.0}, 39: {"bbox/AP": 7.0}}
    assert run.metrics("val") == {"bbox/AP": 7.0}
    (message,) = caplog.messages
    path = run.folder / "metrics.json"
    assert message == f"{path}: left out 9 damaged lines, number 2, 3, 4, 5, 6, 7, 8, 9, ..."


@pytest.mark.parametrize("content", ['[{"image_id": 1, "sc', "[1]", '{"a": 1}', "3"])
def test_damaged_detections_are_named(make_run, content, evaluated_config):
    run = make_run("cut", evaluated_config(), [])
    path = run.folder / "inference" / "val" / "coco_instances_results.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"coco_instances_results.json is cut or damaged .*: evaluate the run again"):
        run.detections("val", 0.5)


def test_network_has_the_weights_of_the_last_checkpoint(make_run, evaluated_config):
    run = make_run("alone", evaluated_config(channels=8), [])
    assert not run.has_checkpoint
    torch.manual_seed(5)
    model = build_model(evaluated_config(channels=8))
    DetectionCheckpointer(model, str(run.folder)).save("model_0000004")
    assert run.has_checkpoint
    assert torch.equal(run.network.head.cls_score.weight, model.head.cls_score.weight)
    assert not run.network.training
    assert run.parameters == sum(parameter.numel() for parameter in model.parameters())
