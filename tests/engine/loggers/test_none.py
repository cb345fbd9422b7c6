from blip2x.config.run import LoggerConfig
from blip2x.registry import LOGGERS


def test_it_takes_everything_and_writes_nothing(tmp_path):
    logger = LOGGERS.get("none")(LoggerConfig(kind="none"), folder=tmp_path, name="n", config={}, warn=print)
    logger.log("stage", 1, {"loss": 1.0})
    logger.close()
    assert list(tmp_path.iterdir()) == []
