"""`orogen launch`: a task on many processes of this host, of SLURM or of Kubernetes.

Every process runs the same command line and is told by `OROGEN_CLUSTER`, or by `--cluster`, which one it is; programs
that start processes in another way set it themselves (`parallel/cluster.py`). The processes answer a roll call
(`parallel/roll_call.py`) and join JAX's multi-controller runtime (`parallel/distributed.py`). `--fake_devices N` of the
task means N devices for each process. The plan covers the devices of all processes, in the order of the processes:
the innermost axes, such as `tensor`, stay within a process if they fit.

A run's bits do not depend on how its devices are divided over processes of CPUs (`parallel/rank_order.py`), except with
Muon, whose products over more than two ranks are left to the partitioner.

**Ends.** SIGTERM, SIGHUP and Ctrl-C at the watcher reach all processes; a signal at any one of them stops all after the
same step. When a process fails, the others are ended within seconds. Without a watcher, the runtime ends them after 40
seconds without a heartbeat. Output is in `RUN.logs/process_K.out` and `.err`.

**Restarts.** A task that fails is started again, up to `--restarts` times, unless its input is bad: exit status 2 of
the process that failed first (`verdict.py` under SLURM, where time limits and failed nodes do not count).
"""
