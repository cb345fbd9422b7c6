"""Which curves share a panel, in which order, and which are left out."""

from __future__ import annotations

from blip2x.engine.report_sections.curves import MAX_LINES, stage_curves


def lines(**series: list[float]) -> list[dict]:
    names = {name.replace("__", "/"): values for name, values in series.items()}
    count = max(map(len, names.values()))
    return [
        {
            "stage": "s",
            "step": 1 + n,
            "seconds": 1.0 * n,
            **{name: values[n] for name, values in names.items() if n < len(values)},
        }
        for n in range(count)
    ]


def panels(metrics: list[dict], schedules: dict | None = None, finished: tuple = ()) -> dict[str, str]:
    found = stage_curves(metrics, schedules or {}, finished)
    return {panel.title: panel.chart + panel.note for panel in found["s"].learning} if found else {}


def test_loss_parts_first_then_rate_and_norm_and_the_rest_by_name():
    rows = lines(digit=[1, 2], temperature=[0.07, 0.06], grad_norm=[1, 2], lr=[1e-4, 1e-5], itc=[3, 2], loss=[4, 3])
    titles = ["loss and its parts", "learning rate", "gradient norm", "temperature of the contrast", "digit"]
    assert list(panels(rows)) == titles
    assert "loss 3<" in panels(rows)[titles[0]] and "itc 2<" in panels(rows)[titles[0]]


def test_speed_waiting_and_memory_stand_apart_with_their_units():
    rows = lines(
        loss=[2, 1], samples_per_second=[5, 6], tokens_per_second=[1e4, 2e4], data_wait_seconds=[0, 1], memory_gb=[1, 2]
    )
    (stage,) = stage_curves(rows, {}, ()).values()
    assert [panel.title for panel in stage.learning] == ["loss"]
    assert [panel.title for panel in stage.speed] == [
        "samples per second", "tokens per second", "waiting for data, seconds", "memory, GB",
    ]  # fmt: skip
    assert ">20,000</text>" in stage.speed[1].chart


def test_keys_with_a_slash_are_lines_of_one_panel():
    rows = lines(
        lr__qformer=[1e-4, 1e-5], lr__vision=[2e-4, 2e-5], CIDEr=[1, 2], held_out__CIDEr=[0, 1], blind_CIDEr=[0.5, 0.5]
    )
    found = panels(rows)
    assert list(found) == ["learning rate", "CIDEr"]
    assert "qformer 1e-5" in found["learning rate"] and "vision 2e-5" in found["learning rate"]
    assert all(name in found["CIDEr"] for name in ("all 2<", "held out 1<", "no picture 0.5<"))


def test_a_plan_is_drawn_with_all_groups():
    shape = {"lr": 1e-4, "warmup_start_lr": 1e-6, "warmup_steps": 1, "eta_min": 1e-5, "total_steps": 5}
    rows = lines(lr=[1e-4, 5e-5], lr__vision=[1e-5, 5e-6])
    chart = panels(rows, {"s": shape})["learning rate"]
    assert all(f"<title>{name}: " in chart for name in ("plan", "logged", "vision"))


def test_many_lines_are_thinned_evenly_and_say_so():
    chart = panels(lines(**{f"lr__layer{n:02}": [n, n] for n in range(40)}))["learning rate"]
    assert chart.count("<polyline") == MAX_LINES and f"{MAX_LINES} of 40 lines, evenly chosen" in chart
    assert "layer00" in chart and "layer39" in chart


def test_what_was_measured_once_is_no_curve_of_a_stage_with_results():
    rows = lines(loss=[2, 1], eval_loss=[1.5])
    assert list(panels(rows, finished=("s",))) == ["loss"]
    assert list(panels(rows)) == ["loss", "eval loss"]  # of a run that failed, all that is known


def test_accuracies_by_type_chance_and_interval_ends_are_in_tables_only():
    rows = lines(accuracy=[1, 2], accuracy__answer_type__other=[1, 2], chance=[1, 1], ci95_low_accuracy=[0, 1])
    found = panels(rows)
    assert list(found) == ["accuracy"] and found["accuracy"].count("<polyline") == 1
