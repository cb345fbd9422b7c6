import io
import math

from rich.console import Console

from blip2x.engine.table import results_table


def printed(results: dict) -> str:
    text = io.StringIO()
    Console(width=100, file=text).print(results_table(results))
    return text.getvalue()


def test_a_metric_and_its_baselines_share_a_row():
    text = printed({"vqa_zeroshot": {"accuracy": 71.0, "blind_accuracy": 35.2, "majority_accuracy": 37.0}, "seconds": 280.1})
    (row,) = [line for line in text.splitlines() if "vqa_zeroshot" in line]
    assert "71.0 %" in row and "35.2 % no picture" in row and "+35.8 points" in row
    assert "37.0 % commonest answer" in text and "+34.0 points" in text
    assert "280 seconds" in text


def test_a_stage_is_named_once_and_question_types_are_left_to_the_report():
    text = printed({"caption": {"CIDEr": 2.1, "BLEU-4": 0.5}, "vqa_zeroshot": {"accuracy": 1.0, "accuracy/how many": 2.0}})
    assert text.count("caption") == 1
    assert "how many" not in text


def test_a_value_has_its_interval_beside_it():
    text = printed({"caption": {"CIDEr": 2.1, "ci95_low_CIDEr": 1.98, "ci95_high_CIDEr": 2.21, "blind_CIDEr": 0.3}})
    (row,) = [line for line in text.splitlines() if "CIDEr" in line]
    assert "2.10 [1.98, 2.21]" in row and "0.300 no picture" in row


def test_nan_and_markup_are_printed_as_they_are():
    text = printed({"[red]mine": {"loss[0]": math.nan}})
    assert "[red]mine" in text and "loss[0]" in text and "not a number" in text


def test_nothing_to_show_is_an_empty_table():
    assert results_table({}).row_count == 0


def test_a_training_that_was_stopped_says_so():
    text = printed({"pruned": 20, "seconds": 9.2, "peak_memory_gb": 0.5})
    assert "9 seconds, stopped at step 20, 0.5 GB peak memory" in text and "pruned" not in text  # it is no metric
