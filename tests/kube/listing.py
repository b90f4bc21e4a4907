"""Lists: selectors, pages and the version a watch can go on from."""

from __future__ import annotations

import secrets

from tests.kube.errors import Object, bad_request, expired
from tests.kube.kinds import Kind
from tests.kube.selectors import Selector
from tests.kube.store import Store

_MAX_OPEN_PAGES = 1000


class Lists:
    """Answers lists; remembers what is left of those that asked for pages."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pages: dict[str, tuple[int, list[Object]]] = {}

    def answer(self, kind: Kind, namespace: str, query: dict[str, str]) -> Object:
        """One page. Raises 410 for a ``continue`` from before a compaction."""
        limit = int(query.get("limit") or 0)
        if token := query.get("continue"):
            version, items = self._rest(token)
        else:
            version, items = self._all(kind, namespace, query)
        metadata: Object = {"resourceVersion": str(version)}
        if limit and len(items) > limit:
            metadata["continue"] = self._keep(version, items[limit:])
            metadata["remainingItemCount"] = len(items) - limit
            items = items[:limit]
        return {
            "kind": f"{kind.kind}List",
            "apiVersion": kind.api_version,
            "metadata": metadata,
            "items": items,
        }

    def _all(self, kind: Kind, namespace: str, query: dict[str, str]) -> tuple[int, list[Object]]:
        selector = Selector(
            kind.resource, query.get("labelSelector", ""), query.get("fieldSelector", "")
        )
        with self._store.lock:
            self._check_version(query)
            found = [item for item in self._store.list(kind, namespace) if selector.matches(item)]
            return self._store.version, found

    def _check_version(self, query: dict[str, str]) -> None:
        """Exact versions from before a compaction are gone; versions to come are refused."""
        wanted = query.get("resourceVersion") or "0"
        if not wanted.isdigit():
            raise bad_request(f'invalid resource version: "{wanted}"')
        is_exact = query.get("resourceVersionMatch") == "Exact"
        if is_exact and int(wanted) < self._store.oldest_version:
            raise expired(f"The resourceVersion for the provided list is too old ({wanted})")

    def _keep(self, version: int, items: list[Object]) -> str:
        token = secrets.token_urlsafe(12)
        if len(self._pages) >= _MAX_OPEN_PAGES:
            self._pages.pop(next(iter(self._pages)))
        self._pages[token] = (version, items)
        return token

    def _rest(self, token: str) -> tuple[int, list[Object]]:
        found = self._pages.get(token)
        if found is None:
            raise bad_request("continue key is not valid")
        if found[0] < self._store.oldest_version:
            raise expired(
                "The provided continue parameter is too old to display a consistent list result. "
                "You can start a new list without the continue parameter, or use the continue "
                "token in this response to retrieve the remainder of the results."
            )
        return found
