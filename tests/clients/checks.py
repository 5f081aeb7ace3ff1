"""One line for each check; the program fails when any check does."""
import sys
import traceback


class Checks:
    def __init__(self, client):
        self.client = client
        self.failed = 0

    def __call__(self, name):
        """Runs the decorated function at once. What it returns, if anything, is told beside the name."""

        def run(function):
            try:
                said = function()
            except Exception:  # every way of failing is a failure of the check
                self.failed += 1
                print(f"FAILED  {self.client}: {name}\n{traceback.format_exc()}", flush=True)
                return function
            told = f" ({said})" if said else ""
            print(f"ok      {self.client}: {name}{told}", flush=True)
            return function

        return run

    def end(self):
        sys.exit(1 if self.failed else 0)


def metric(page, name, **labels):
    """A value of a metrics page; 0 where it is not there yet."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    for line in page.splitlines():
        series, _, value = line.rpartition(" ")
        if series.split("{")[0] == name and all(label in series for label in wanted):
            return float(value)
    return 0.0
