"""What a training shows while it runs: a bar, log.csv, loss.png, sheet.png. Of several processes the first one does."""

import time

from tqdm import tqdm

from models.support.charts import Log, save_sheet
from models.support.machine import mean_over_processes


class Progress:
    """The bar and the log of a run."""

    def __init__(self, run):
        """Open log.csv; rows after the step at which the run is resumed are dropped."""
        self.run = run
        self.is_first = run.rank == 0
        if self.is_first:
            columns = ["step", *run.terms, "grad_norm", "lr", "seconds", "held_out", "psnr", *run.columns]
            self.log = Log(run.out / "log.csv", columns, run.step or -1)

    def begin(self):
        """Show the bar, begin the first row."""
        hidden = None if self.is_first else True        # None: where no terminal shows it
        self.bar = tqdm(total=self.run.stage.steps, initial=self.run.step, unit="step", dynamic_ncols=True,
                        disable=hidden)
        self.begin_row()

    def begin_row(self):
        """Begin to sum up losses and to count seconds."""
        self.run.sums = dict.fromkeys(self.run.terms, 0.0)
        self.since, self.clock = self.run.step, time.time()

    def finish_row(self):
        """Finish a row of the log: losses are means over the steps since the row before, and shown beside the bar.

        -> {column: value}
        """
        run = self.run
        row = {"step": run.step, "grad_norm": float(run.grad_norm), "lr": run.lr, "seconds": time.time() - self.clock}
        losses = {}
        for name, total in run.sums.items():
            losses[name] = mean_over_processes(float(total / (run.step - self.since)), run.device)
        self.bar.set_postfix({name: f"{x:.3f}" for name, x in losses.items()}, refresh=False)
        self.begin_row()
        return row | losses

    def write(self, row):
        """Write a row of the log.  row: {column: value}"""
        if self.is_first:
            self.log.write(**row)

    def draw(self, metrics, images):
        """Show an evaluation: metrics on the terminal, loss.png, and sheet.png of six of the images in each column."""
        if not self.is_first:
            return
        run = self.run
        tqdm.write(f"step {run.step}: " + ", ".join(f"{name} {x:.4f}" for name, x in metrics.items()))
        self.log.draw(run.out / "loss.png", [*run.terms, "held_out"], run.title)
        if images:
            save_sheet(run.out / "sheet.png", {title: x[:6] for title, x in images.items()})
