"""The measurement: servers up, then every system in turn, round by round, and what each server used."""

import contextlib
import time

from tqdm import tqdm

from bench import client, processes
from bench.arithmetic import describe_window
from bench.systems import PROJECT, hide_paths

IDLE_S = 3  # all servers up and none asked: what they use then disturbs the one that is


class Bench:
    """What one run has: its settings, its systems, their servers, and what was found."""

    def __init__(self, args, systems, facts, texts, expected):
        self.args, self.facts, self.expected = args, facts, expected
        self.service = facts["service"]
        # of which a coarser precision too gives the same label: the first answer is that to this text
        self.surest = max(range(len(texts)), key=lambda number: expected[number][1])
        self.requests = {s.name: client.make_requests(s, self.service, texts) for s in systems}
        self.systems = {s.name: s for s in systems}
        self.found = {s.name: {} for s in systems}  # name -> start_s, memory, error
        self.windows = []

    def alive(self):
        return [s for name, s in self.systems.items() if "error" not in self.found[name]]

    def fail(self, command, reason):
        """Note why the systems of a command are not measured, or not any more; exits where it is the project's own."""
        for system in self.alive():
            if system.command == command:
                self.found[system.name]["error"] = hide_paths(reason)
                tqdm.write(f"{system.name}: not measured: {reason}")
                if system.kind == PROJECT:
                    raise SystemExit(
                        f"{system.name}: expected the project's own service measured, found: {reason}; see its log"
                    )


def groups(systems):
    """{command: its systems}: those of one command share a server."""
    found = {}
    for system in systems:
        found.setdefault(system.command, []).append(system)
    return found


def start(bench, systems, stack, key):
    """Start the server of systems of one command, to be ended with the stack; None, and noted, where it does not."""
    first = systems[0]
    with contextlib.ExitStack() as own:
        try:
            server = processes.start(first, bench.facts, bench.args.work / first.name.replace("/", " "))
            own.callback(processes.end, server)
            request, answer = bench.requests[first.name][bench.surest], bench.expected[bench.surest]
            seconds = processes.wait_answer(first, server, bench.service, request, answer, bench.args.timeout_s)
            facts = processes.executed_by(first, server, bench.service)
        except (processes.NotMeasured, OSError) as error:
            bench.fail(first.command, str(error))
            return None
        stack.push(own.pop_all())
    for system in systems:
        bench.found[system.name].setdefault(key, []).append(seconds)
        bench.found[system.name] |= facts
    return server


def measure_window(bench, system, server, number, concurrency, count):
    """One window into bench.windows; round 0 warms up and is not kept."""
    before = processes.triton_batches(system, server, bench.service), processes.cpu_s(server)
    start_at = number * count  # every system of a round gets the same texts, every round others
    window = client.run_window(
        system, server.ports, bench.service, bench.requests[system.name], concurrency, start_at, count
    )
    after = processes.triton_batches(system, server, bench.service), processes.cpu_s(server)
    row = describe_window(system, window, bench.expected)
    if row["answers"]["failed"] == count:
        raise processes.NotMeasured(f"no answer to {count} requests: {processes.last_line(server.log)}")
    row |= {"system": system.name, "round": number, "concurrency": concurrency}
    row["cpu_ms_per_text"] = 1000 * (after[1] - before[1]) / count
    row["batches"] = [b - a for a, b in zip(before[0], after[0], strict=True)] if before[0] and after[0] else None
    if number:
        bench.windows.append(row)


def measure_turn(bench, system, server, number, concurrency, progress):
    """measure_window, or why not; nothing for a system that failed before."""
    progress.update()
    if "error" in bench.found[system.name]:
        return
    count = dict(zip(bench.args.concurrency, bench.args.requests, strict=True))[concurrency]
    try:
        measure_window(bench, system, server, number, concurrency, count)
    except (processes.NotMeasured, OSError) as error:
        bench.fail(system.command, str(error))


def rotate(items, by):
    """So that nobody is always asked behind the same neighbour."""
    items = list(items)
    return items[by % len(items) :] + items[: by % len(items)] if items else items


def measure_together(bench, progress):
    """All servers up; each system is asked alone, in turn. Every server is started twice: the first warms the files."""
    servers = {}
    with contextlib.ExitStack() as stack:
        for command, systems in groups(bench.alive()).items():
            with contextlib.ExitStack() as once:
                started = start(bench, systems, once, "first_start_s")
            server = started and start(bench, systems, stack, "start_s")
            if server:
                servers[command] = server
        note_idle(bench, servers)
        for number in range(bench.args.rounds + 1):
            for concurrency in bench.args.concurrency:
                for system in rotate(bench.alive(), number):
                    measure_turn(bench, system, servers[system.command], number, concurrency, progress)
        note_memory(bench, servers)


def note_idle(bench, servers):
    """Memory and processor time of servers that nobody asks."""
    time.sleep(1)
    before = {command: processes.cpu_s(server) for command, server in servers.items()}
    time.sleep(IDLE_S)
    cores = {command: (processes.cpu_s(server) - before[command]) / IDLE_S for command, server in servers.items()}
    memory = {command: processes.memory_mib(server) for command, server in servers.items()}
    for name, system in bench.systems.items():
        if system.command in servers:
            facts = {"memory_idle_mib": memory[system.command], "idle_cpu_cores": cores[system.command]}
            bench.found[name] |= facts


def note_memory(bench, servers):
    """Memory of servers that have done their work."""
    for system in bench.alive():
        if system.command in servers:
            bench.found[system.name]["memory_loaded_mib"] = processes.memory_mib(servers[system.command])


def measure_apart(bench, progress):
    """One server at a time, started and ended in every round."""
    for number in range(1, bench.args.rounds + 1):
        for command, systems in groups(rotate(bench.alive(), number)).items():
            with contextlib.ExitStack() as stack:
                server = start(bench, systems, stack, "start_s")
                if server is None:
                    continue
                if number == 1:
                    note_idle(bench, {command: server})
                for concurrency in bench.args.concurrency:
                    for system in systems:
                        measure_turn(bench, system, server, 0, concurrency, progress)
                        measure_turn(bench, system, server, number, concurrency, progress)
                note_memory(bench, {command: server})


def measure(bench):
    """Measure all systems as the arguments say."""
    windows = len(bench.alive()) * len(bench.args.concurrency) * bench.args.rounds
    windows += len(bench.alive()) * len(bench.args.concurrency) * (bench.args.rounds if bench.args.apart else 1)
    with tqdm(total=windows, desc="peers", unit="window", mininterval=1) as progress:
        (measure_apart if bench.args.apart else measure_together)(bench, progress)
