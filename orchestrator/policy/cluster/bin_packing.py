"""Assignment of a cluster's places to runs, one by one: a model of the placement that Ray makes."""

from collections.abc import Collection, Mapping, Sequence

from orchestrator.policy.cluster.capacity import fits, places

Resources = Mapping[str, float]
Ledger = dict[str, dict[str, float]]


class NodePacking:
    """Resources left on each node while places are assigned. All workers of a run need the same resources.

    A worker stays where it is; a run that gets fewer places releases its youngest workers. Free resources are assigned
    before those that other workers would have to leave.

    Args:
        free: unused resources, by node.
        homes: nodes of the workers that each run has now, oldest first; their resources are assigned again.
        requests: resources of a worker, by run.
        avoid: nodes on which a run places no new worker.
    """

    def __init__(
        self,
        free: Mapping[str, Resources],
        homes: Mapping[str, Sequence[str]],
        requests: Mapping[str, Resources],
        avoid: Mapping[str, Collection[str]],
    ) -> None:
        self._free: Ledger = {node: dict(amounts) for node, amounts in free.items()}
        self._left: Ledger = {node: dict(amounts) for node, amounts in free.items()}
        self._homes, self._requests, self._avoid = homes, requests, avoid
        self._kept = dict.fromkeys(requests, 0)  # number of workers that keep their homes
        self._new: dict[str, list[str]] = {run: [] for run in requests}  # other places that a run was given
        for run, nodes in homes.items():
            for node in nodes:
                _add(self._left.setdefault(node, {}), requests[run])

    def copy(self) -> "NodePacking":
        """A copy, for a trial assignment."""
        other = NodePacking({}, {}, self._requests, self._avoid)
        other._free = {node: dict(amounts) for node, amounts in self._free.items()}
        other._left = {node: dict(amounts) for node, amounts in self._left.items()}
        other._homes, other._kept = self._homes, dict(self._kept)
        other._new = {run: list(nodes) for run, nodes in self._new.items()}
        return other

    def num_placed(self, run: str) -> int:
        """Number of places that the run has been given."""
        return self._kept[run] + len(self._new[run])

    def keep(self, run: str, workers: int) -> None:
        """Give the run up to `workers` places in all, of those that its workers have already."""
        homes = self._homes.get(run, ())
        while self.num_placed(run) < workers and self._kept[run] < len(homes):
            node = homes[self._kept[run]]
            if not fits(self._left[node], self._requests[run]):
                return
            _take(self._left[node], self._requests[run])
            self._kept[run] += 1

    def place(self, run: str, workers: int, avoid: Collection[str] = ()) -> bool:
        """Give the run `workers` places in all, or as many as there are. A run whose worker has to leave its place gets
        no other place for it at once.

        Args:
            avoid: nodes that are kept for others, apart from the run's own places there.

        Returns:
            whether it has them all.
        """
        self.keep(run, workers)
        if self._kept[run] == len(self._homes.get(run, ())):
            for ledger in (self._free, self._left):
                for node in ledger:
                    while node not in avoid and self.num_placed(run) < workers and self._give(run, node, ledger):
                        pass
        return self.num_placed(run) >= workers

    def place_on(self, run: str, nodes: Collection[str]) -> None:
        """Give the run these places, as found in a copy."""
        for node in nodes:
            self._give(run, node, self._left)

    def new_places(self, run: str) -> tuple[str, ...]:
        """Nodes of the places given to the run, apart from those that it has already."""
        return tuple(self._new[run])

    def places(self, run: str) -> tuple[str, ...]:
        """Nodes of all places given to the run."""
        return (*self._homes.get(run, ())[: self._kept[run]], *self._new[run])

    def has_homes(self, run: str) -> bool:
        """Whether the run has workers now, regardless of the places given to it."""
        return bool(self._homes.get(run, ()))

    def withhold(self, nodes: Collection[str]) -> None:
        """Assign nothing that is left on these nodes; places taken back from a run there may be assigned again."""
        for ledger in (self._free, self._left):
            ledger.update({node: {} for node in nodes})

    def unseat(self, run: str) -> None:
        """Take all its places away again."""
        for node in self.places(run):
            _add(self._left[node], self._requests[run])
        for node in self._new[run]:
            _add(self._free[node], self._requests[run])
        self._kept[run], self._new[run] = 0, []

    def usable(self, run: str) -> set[str]:
        """Nodes that could hold a worker of the run if the cluster were otherwise empty."""
        return {n for n, amounts in self._whole(run).items() if fits(amounts, self._requests[run])}

    def capacity(self, run: str) -> int:
        """Number of the run's workers that the cluster could hold if it were otherwise empty."""
        return places(list(self._whole(run).values()), self._requests[run])

    def _whole(self, run: str) -> Ledger:
        """All resources of the nodes that the run may use."""
        whole = {node: dict(amounts) for node, amounts in self._left.items()}
        for other in self._requests:
            for node in self.places(other):
                _add(whole[node], self._requests[other])
        return {node: amounts for node, amounts in whole.items() if node not in self._avoid[run]}

    def _give(self, run: str, node: str, ledger: Ledger) -> bool:
        """Give the run a place on a node, from free resources first. Args: ledger: must have room for it, too."""
        request, left = self._requests[run], self._left.get(node)
        if left is None or node in self._avoid[run] or not (fits(left, request) and fits(ledger[node], request)):
            return False
        _take(left, request)
        free = self._free.setdefault(node, {})
        for name, amount in request.items():
            free[name] = max(0.0, free.get(name, 0.0) - amount)
        self._new[run].append(node)
        return True


def _take(amounts: dict[str, float], request: Resources) -> None:
    for name, amount in request.items():
        amounts[name] = amounts.get(name, 0.0) - amount


def _add(amounts: dict[str, float], request: Resources) -> None:
    for name, amount in request.items():
        amounts[name] = amounts.get(name, 0.0) + amount
