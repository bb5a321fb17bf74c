"""Pairs of images by equal names: which belong together, and the loop of degrade.py's command, which makes them."""

import os
import sys
from collections import defaultdict
from pathlib import Path

from tqdm import tqdm

from models.support.arguments import Stop
from models.support.files import PictureError, claim, disk_full_or_read_only, output_paths, printable
from models.support.imaging import write_picture


def find_partners(names, others, scale=4):
    """Find for each name the file of the same name, maybe of another suffix, or without DIV2K's x4.

    names: paths relative to their folder; others: {path: its name, relative to another folder}; scale: after that x
    -> list of tuples of the others' paths: one if all is well, none, several
    """
    exact, by_stem = {}, defaultdict(tuple)
    for path, name in others.items():
        exact[name] = path,
        by_stem[name.with_suffix("")] += path,
    found = []
    for name in names:
        div2k = name.with_name(name.stem.removesuffix(f"x{scale:g}") or name.stem)      # 0801x4.png -> 0801
        found.append(exact.get(name) or by_stem[name.with_suffix("")] or by_stem[div2k])
    return found


def write_pairs(command, names, out_dir, skip_existing, pair):
    """Write the pairs of all images, name what fails; a full disk is the end.  -> exit status

    command: whose messages they are; names: {path: name}; skip_existing: keep whole pairs; pair: (path, name) -> lq, hq
    """
    inputs, results = set(map(os.path.realpath, names)), output_paths(names, Path(), ())
    done, failed, stopped, no_room = 0, 0, False, False
    with Stop() as stop:
        for (path, name), result in zip(tqdm(names.items(), unit="image", disable=None), results):
            targets = [out_dir / kind / result for kind in ("lq", "hq")]
            try:
                if stop:
                    raise KeyboardInterrupt
                for target in targets:
                    claim(target, path, inputs)
                if not (skip_existing and all(map(os.path.exists, targets))):
                    with stop.droppable():
                        pictures = pair(path, name)
                    for target, x in zip(targets, pictures):
                        write_picture(target, x, software="nanoSR degrade.py")     # which is an input
                done += 1
            except PictureError as error:
                failed += 1
                tqdm.write(f"{command}: {error}", file=sys.stderr)
                no_room = disk_full_or_read_only(error)
                if no_room:
                    break
            except KeyboardInterrupt:       # the pair at hand is dropped
                stopped = True
                break
    if stopped or no_room:
        print(f"stopped after {done + failed} of {len(names)}; add --skip-existing to go on", file=sys.stderr)
    print(printable(f"{done} pictures in {out_dir / 'lq'} and {out_dir / 'hq'}, {failed} skipped"))
    return 130 if stopped else int(failed > 0)
