"""Paddle's variables made of Slurm's, and its short forms of names and counts."""

import pytest

from blip2x.errors import UserError
from blip2x.parallel.launch_env import FIRST_PORT, PORTS, card, expand_counts, expand_hosts, join_slurm, rendezvous_port


def task(rank=0, **changes):
    """What `srun` gives a task: 5 of them, 2 + 2 on a1 and a2, 1 on b."""
    node, local = divmod(rank, 2)
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
    step = {"SLURM_JOB_ID": "81", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "5", "SLURM_NTASKS": "5"}
    nodes = {"SLURM_STEP_NODELIST": "a[1-2],b", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_CPUS_ON_NODE": "16"}
    return {name: value for name, value in {**own, **step, **nodes, **changes}.items() if value is not None}


def joined(rank=0, cores=16, **changes):
    environ = task(rank, **changes)
    join_slurm(environ, cores)
    return environ


def test_every_task_learns_its_place():
    ranks = [joined(rank) for rank in range(5)]
    assert [e["PADDLE_TRAINER_ID"] for e in ranks] == ["0", "1", "2", "3", "4"]
    assert [e["PADDLE_LOCAL_RANK"] for e in ranks] == [e["FLAGS_selected_gpus"] for e in ranks] == ["0", "1", "0", "1", "0"]
    assert [e["PADDLE_LOCAL_SIZE"] for e in ranks] == ["2", "2", "2", "2", "1"]
    assert {e["PADDLE_TRAINERS_NUM"] for e in ranks} == {"5"} and {e["PADDLE_NNODES"] for e in ranks} == {"3"}
    (master,) = {e["PADDLE_MASTER"] for e in ranks}
    assert master == f"a1:{rendezvous_port(81, 0)}"
    (endpoints,) = {e["PADDLE_TRAINER_ENDPOINTS"] for e in ranks}
    assert [e["PADDLE_CURRENT_ENDPOINT"] for e in ranks] == endpoints.split(",")
    assert [endpoint.split(":")[0] for endpoint in endpoints.split(",")] == ["a1", "a1", "a2", "a2", "b"]
    assert len({master, *endpoints.split(",")}) == 6


@pytest.mark.parametrize(
    "changes",
    [
        {"PADDLE_TRAINERS_NUM": "2"},  # paddle's launcher as the one task of a node
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty
        {"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None},  # a batch script that starts python itself
        {"SLURM_STEP_ID": "4294967290"},  # the shell of salloc
        {"SLURM_PROCID": None},
        {"SLURM_STEP_NUM_TASKS": None},
    ],
)
def test_who_is_no_task_among_several_is_left_alone(changes):
    assert joined(**changes) == task(**changes)


def test_a_master_that_is_set_is_kept():
    assert joined(PADDLE_MASTER="gateway:1234")["PADDLE_MASTER"] == "gateway:1234"


def test_cores_that_slurm_gave_to_this_task_alone_are_not_shared_again():
    assert joined(cores=8)["PADDLE_LOCAL_SIZE"] == "1"  # of the 16 on this node
    assert joined(cores=16)["PADDLE_LOCAL_SIZE"] == "2"
    assert joined(cores=16, SLURM_CPUS_ON_NODE=None)["PADDLE_LOCAL_SIZE"] == "2"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
        ({"SLURM_STEP_NODELIST": "a[1-"}, r"host names 'a\[1-' that Slurm gives"),
        ({"SLURM_STEP_TASKS_PER_NODE": "many"}, "tasks per node 'many'"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,2"}, r"counts \[2, 2\] tasks on .* task 0 of 5"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, r"counts \[2, 2, 2\] tasks"),
        ({"SLURM_PROCID": "5"}, "task 5 of 5"),
        ({"SLURM_LOCALID": "first"}, "SLURM_LOCALID=first is no number"),
        ({"SLURM_JOB_ID": None}, "SLURM_JOB_ID is not set"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(changes, named):
    with pytest.raises(UserError, match=f"{named}.*paddle.distributed.launch"):
        joined(**changes)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node", ["node"]),
        ("a1,b2", ["a1", "b2"]),
        ("node[03-05,07]", ["node03", "node04", "node05", "node07"]),
        ("n[8-11]", ["n8", "n9", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("r[1-2]n[3,5]-ib,x", ["r1n3-ib", "r1n5-ib", "r2n3-ib", "r2n5-ib", "x"]),
        ("127.0.0.1", ["127.0.0.1"]),
    ],
)
def test_host_names(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize(("text", "counts"), [("8", [8]), ("8(x2),4", [8, 8, 4]), ("1,2(x1)", [1, 2])])
def test_counts(text, counts):
    assert expand_counts(text) == counts


def test_steps_meet_at_ports_of_their_own():
    ports = {rendezvous_port(job, step) for job in range(40_000, 40_050) for step in range(3)}
    assert len(ports) == 150 and all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)


def test_a_task_that_sees_its_own_gpus_only_takes_the_first():
    assert [card(local, None) for local in range(3)] == [0, 1, 2]
    assert [card(local, "4,5,6") for local in range(3)] == [0, 1, 2]  # counted among the visible ones
    assert [card(local, "5") for local in range(3)] == [0, 0, 0]
