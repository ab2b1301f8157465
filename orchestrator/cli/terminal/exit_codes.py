"""Exit codes of the command line. Those of errors are `exit_code` of their classes in `orchestrator.errors`."""

CHECK_FAILED = 3
BUG = 70

EXIT_CODES = {
    0: "done; of `run` and `wait`: the run succeeded",
    1: "something outside of this program failed, such as a server that does not answer; the message names it",
    2: "usage, job file, a name that is taken, a text that can't be used, a request that the run does not allow: "
    "nothing was started or changed",
    CHECK_FAILED: "a check found something: `check data`, `check replay`, `doctor`",
    69: "no cluster, or it does not answer",
    BUG: "a bug in this program, or processes of different versions; the traceback is on stderr",
    77: "the cluster refused this user's token, or asks for none although others reach it; or others may read the "
    "token file",
    100: "the run failed",
    101: "not finished: the run is paused or active; of `run` after Ctrl-C, when the run continues; of `wait` after "
    "`--timeout`, or with `--storage` once nothing seems to write the run's journal",
    102: "no such run, checkpoint or log",
    103: "the run was stopped",
    104: "run storage can't be read or written, or records of a run, a checkpoint or token store have changed or "
    "missing files",
    105: "the cluster has no room for the job's workers",
    129: "SIGHUP ended the command: its terminal was closed",
    130: "Ctrl-C (SIGINT) ended the command",
    143: "SIGTERM ended the command",
}
