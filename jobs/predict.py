"""Finds landmarks on images, shards or a video.

Writes DIR/predictions.json (COCO keypoints), DIR/predictions.csv, and DIR/pictures/ or DIR/video.mp4 with the landmarks
drawn; after `landmarks name` also the named points, as DIR/named.json and DIR/named.csv.
"""

from collections.abc import Sequence

import tyro

from sst.errors import exit_on_user_error
from sst.predict.writer import Predict, write_predictions
from sst.run.preflight import check_kept

COMMAND = Predict


@exit_on_user_error()
def main(arguments: Sequence[str] | None = None, prog: str = "python -m jobs.predict") -> None:
    """Parses the command line and predicts; a mistake gives a message on stderr and exit code 2."""
    config = tyro.cli(COMMAND, prog=prog, description=__doc__, args=arguments)
    check_kept(out=config.out)
    write_predictions(config)


if __name__ == "__main__":
    main()
