#!/usr/bin/env python3
"""The tiny models' configurations once more, as transformers 5 writes them (`rope_parameters` in place of `rope_theta` and
`rope_scaling`). Needs transformers 5, and nothing else: its own virtual environment.

    python make_config_v5.py TINY      reads TINY/NAME/config.json, writes TINY/NAME/config.v5.json
"""

import os
import shutil
import sys
import tempfile

import transformers


def main():
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    assert int(transformers.__version__.split(".")[0]) >= 5, transformers.__version__
    for name in sorted(os.listdir(sys.argv[1])):
        directory = os.path.join(sys.argv[1], name)
        with tempfile.TemporaryDirectory() as out:
            transformers.AutoConfig.from_pretrained(directory).save_pretrained(out)
            shutil.copy(os.path.join(out, "config.json"), os.path.join(directory, "config.v5.json"))


if __name__ == "__main__":
    main()
