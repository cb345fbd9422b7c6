import json
import math

import pytest

from blip2x.engine.comparisons import (
    HIGHER,
    LOWER,
    MINUS,
    TIMES,
    UNKNOWN,
    Baseline,
    compact,
    direction,
    metric_title,
    read_measures,
    stage_title,
)

RESULTS = {
    "pretrain_stage1": {
        "i2t_recall@1": 0.41,
        "i2t_recall@5": 0.8,
        "itm_accuracy": 0.9,
        "chance": 0.0025,
        "held_out/chance": 0.01,
    },
    "caption": {"blind_CIDEr": 0.3, "CIDEr": 2.1, "held_out/CIDEr": 1.5, "pictures": 400},
    "vqa_zeroshot": {
        "accuracy": 71.0,
        "blind_accuracy": 35.2,
        "majority_accuracy": 37.0,
        "accuracy/how many": 30.0,
        "blind_accuracy/how many": 40.0,
        "held_out/accuracy/how many": 20.0,
        "held_out/blind_accuracy/how many": 10.0,
    },
    "seconds": 280.1,
}


def found(results: dict = RESULTS) -> dict:
    return {(measure.stage, measure.key): measure for measure in read_measures(results)}


def test_baselines_stand_beside_their_metric_and_are_none_themselves():
    measures = found()
    assert ("vqa_zeroshot", "blind_accuracy") not in measures and ("run", "seconds") not in measures
    assert measures["vqa_zeroshot", "accuracy"].baselines == (Baseline("blind", 35.2), Baseline("majority", 37.0))
    assert measures["caption", "CIDEr"].baselines == (Baseline("blind", 0.3),)
    assert measures["vqa_zeroshot", "held_out/accuracy/how many"].baselines == (Baseline("blind", 10.0),)


def test_a_baseline_of_everything_is_not_lent_to_the_held_out_part():
    assert found()["caption", "held_out/CIDEr"].baselines == ()


def test_chance_is_of_recall_at_1_only():
    measures = found()
    assert measures["pretrain_stage1", "i2t_recall@1"].baselines == (Baseline("chance", 0.0025),)
    assert measures["pretrain_stage1", "i2t_recall@5"].baselines == ()
    assert measures["pretrain_stage1", "itm_accuracy"].baselines == ()


def test_matching_stands_beside_its_commonest_answer():
    measures = found(
        {"pretrain_stage1": {"t2i_recall@1": 0.4, "chance": 0.01, "itm_accuracy": 0.7, "majority_itm_accuracy": 2 / 3}}
    )
    matching = measures["pretrain_stage1", "itm_accuracy"]
    assert matching.baselines == (Baseline("majority", 2 / 3),)
    assert (matching.shown(2 / 3), matching.gain(matching.baselines[0])) == ("66.7 %", "+3.3 points")
    assert matching.gain(Baseline("majority", 0.7 + 1e-8)) == "+0.0 points"  # rounding is no loss


def test_chance_is_of_the_accuracies_where_there_is_no_recall():
    measures = found({"pretrain_vision": {"digit_accuracy": 0.95, "loss": 0.2, "chance": 0.1}})
    assert measures["pretrain_vision", "digit_accuracy"].baselines == (Baseline("chance", 0.1),)
    assert measures["pretrain_vision", "loss"].baselines == ()


def test_an_interval_belongs_to_its_measure_and_is_none_itself():
    metrics = {"accuracy": 71.0, "ci95_low_accuracy": 70.04, "ci95_high_accuracy": 71.96, "accuracy/answer_type/yes/no": 3.0}
    metrics |= {"ci95_low_accuracy/answer_type/yes/no": 2.0, "ci95_high_accuracy/answer_type/yes/no": 4.0}
    metrics |= {"x/accuracy": 1.0, "x/ci95_low_accuracy": 0.5, "x/ci95_high_accuracy": 1.5, "y/accuracy": 1.0}
    measures = found({"vqa_zeroshot": metrics})
    assert len(measures) == 4
    assert {key: measure.shown_interval() for (_, key), measure in measures.items()} == {
        "accuracy": "[70.0, 72.0]",
        "accuracy/answer_type/yes/no": "[2.0, 4.0]",
        "x/accuracy": "[0.50, 1.5]",
        "y/accuracy": "",
    }
    assert measures["vqa_zeroshot", "accuracy/answer_type/yes/no"].part == "answer_type/yes/no"


@pytest.mark.parametrize("end", ["ci95_low_CIDEr", "ci95_high_CIDEr"])
def test_half_an_interval_is_none(end):
    (measure,) = read_measures({"caption": {"CIDEr": 1.0, end: 0.9}})
    assert measure.interval is None
    (measure,) = read_measures({"caption": {"CIDEr": 1.0, "ci95_low_CIDEr": math.nan, "ci95_high_CIDEr": 2.0}})
    assert measure.shown_interval() == ""


def test_groups_of_any_name_are_told_from_types():
    metrics = {"CIDEr": 1.0, "in-domain/CIDEr": 1.2, "in-domain/blind_CIDEr": 0.2, "CIDEr/long": 0.5, "blind_CIDEr/long": 0.1}
    places = {(measure.scope, measure.name, measure.part): measure.baselines for measure in read_measures({"caption": metrics})}
    assert places == {
        ("", "CIDEr", ""): (),
        ("in-domain", "CIDEr", ""): (Baseline("blind", 0.2),),
        ("", "CIDEr", "long"): (Baseline("blind", 0.1),),
    }


@pytest.mark.parametrize(
    ("stage", "key", "shown", "gains"),
    [
        ("pretrain_stage1", "i2t_recall@1", "41.0 %", [f"164{TIMES}"]),
        ("pretrain_stage1", "itm_accuracy", "90.0 %", []),
        ("caption", "CIDEr", "2.10", [f"7.0{TIMES}"]),
        ("caption", "pictures", "400", []),
        ("vqa_zeroshot", "accuracy", "71.0 %", ["+35.8 points", "+34.0 points"]),
        ("vqa_zeroshot", "accuracy/how many", "30.0 %", [f"{MINUS}10.0 points"]),
    ],
)
def test_values_and_gains_in_the_unit_of_the_metric(stage, key, shown, gains):
    measure = found()[stage, key]
    assert measure.shown() == shown
    assert [measure.gain(baseline) for baseline in measure.baselines] == gains


def test_a_fraction_of_a_per_cent_keeps_its_digits():
    measure = found()["pretrain_stage1", "i2t_recall@1"]
    assert measure.shown(measure.baselines[0].value) == "0.25 %"


@pytest.mark.parametrize("broken", [math.nan, math.inf, None])
def test_no_gain_from_or_over_what_is_no_number(broken):
    for values in ({"CIDEr": broken, "blind_CIDEr": 0.3}, {"CIDEr": 1.0, "blind_CIDEr": broken}):
        (measure,) = read_measures({"caption": values})
        assert measure.gain(measure.baselines[0]) == ""
        assert "na" not in measure.shown()


def test_no_factor_over_nothing():
    (measure,) = read_measures({"caption": {"CIDEr": 1.0, "blind_CIDEr": 0.0}})
    assert measure.gain(measure.baselines[0]) == ""


def test_a_factor_over_next_to_nothing_is_not_drawn_out():
    (measure,) = read_measures({"caption": {"BLEU-4": 0.15, "blind_BLEU-4": 2.7e-7}})
    assert measure.gain(measure.baselines[0]) == f"over 1,000{TIMES}"


def test_words_are_no_measures():
    assert read_measures(json.loads('{"caption": {"CIDEr": 1.0, "best": "x", "done": true}, "note": "y"}'))[0].name == "CIDEr"
    assert len(read_measures({"caption": {"best": "x", "done": True}})) == 0


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.000"), (12345, "12,345"), (0.00012, "0.00012"), (12.345, "12.3"), (1.9, "1.90")]
)
def test_compact(value, text):
    assert compact(value) == text


def test_titles_of_known_and_of_own_names():
    assert stage_title("vqa_zeroshot") == "Zero-shot answers" and stage_title("one_digit_first") == "One digit first"
    assert metric_title("t2i_recall@5") == "text to image, recall@5" and metric_title("ROUGE_L") == "ROUGE-L"
    assert metric_title("itc_i2t_recall@1") == "image to text, recall@1, by contrast alone"
    assert metric_title("itc_r_mean") == "mean of the six recalls, by contrast alone"


def test_retrieval_with_and_without_matching():
    metrics = {"i2t_recall@1": 0.5, "r_mean": 0.612, "itc_i2t_recall@1": 0.4, "itc_r_mean": 0.55, "chance": 0.01}
    metrics |= {"ci95_low_itc_r_mean": 0.5, "ci95_high_itc_r_mean": 0.601}
    measures = found({"retrieval": metrics})
    assert [measure.shown() for measure in measures.values()] == ["50.0 %", "61.2 %", "40.0 %", "55.0 %"]
    assert measures["retrieval", "itc_r_mean"].shown_interval() == "[50.0, 60.1]"
    for name, baselines in (("i2t_recall@1", 1), ("itc_i2t_recall@1", 1), ("r_mean", 0), ("itc_r_mean", 0)):
        assert len(measures["retrieval", name].baselines) == baselines


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("CIDEr", "BLEU-4", "METEOR", "ROUGE_L", "SPICE", "held_out/CIDEr", "blind_CIDEr"), HIGHER),
        (("accuracy", "accuracy/spatial colour", "itm_accuracy", "eval_itm_accuracy", "digit_accuracy"), HIGHER),
        (("i2t_recall@1", "seen/t2i_recall@10", "r_mean", "itc_r_mean", "samples_per_second"), HIGHER),
        (("loss", "eval_loss", "blind_eval_loss", "itc", "eval_itc", "itm", "lm", "perplexity", "t2i_median_rank"), LOWER),
        (("seconds", "data_wait_seconds", "memory_gb", "peak_memory_gb"), LOWER),
        (("lr", "lr/projection", "grad_norm", "loss_scale", "temperature", "chance", "words"), UNKNOWN),
    ],
)
def test_which_direction_is_better(names, expected):
    assert {name: direction(name) for name in names} == dict.fromkeys(names, expected)


@pytest.mark.parametrize(
    ("metrics", "said", "beats"),
    [
        ({"eval_loss": 1.0, "blind_eval_loss": 1.5}, f"0.67{TIMES} the loss without the picture", True),
        ({"eval_loss": 1.5, "blind_eval_loss": 1.0}, f"1.5{TIMES} the loss without the picture", False),
        ({"CIDEr": 1.0, "blind_CIDEr": 1.5}, f"0.67{TIMES} the score without the picture", False),
        ({"CIDEr": 1.5, "blind_CIDEr": 1.0}, f"1.5{TIMES} the score without the picture", True),
    ],
)
def test_a_loss_is_better_where_it_is_lower(metrics, said, beats):
    (measure,) = read_measures({"caption": metrics})
    (baseline,) = measure.baselines
    assert (f"{measure.gain(baseline)} {measure.told(baseline)}", measure.beats(baseline)) == (said, beats)
