"""Who may do what: one permission set, enforced on every request and told to access reviews."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.kube.errors import ApiError, Object, refused
from tests.kube.kinds import Kind


@dataclass(frozen=True)
class Action:
    """What one request wants: a verb on a resource, maybe of one name, in one namespace."""

    verb: str
    group: str
    resource: str  # "pods", "pods/log"
    namespace: str = ""
    name: str = ""


@dataclass
class Permissions:
    """RBAC for the one user of the server, who may do everything until a test says otherwise.

    ``use_role(rules, namespace)`` takes the ``rules`` of a Role as they stand in a manifest and
    from then on only what some given role grants is allowed; ``deny`` takes single verbs away.
    """

    user: str = "system:serviceaccount:airflow:hcodec-launcher"
    _granted: list[tuple[str, Object]] | None = None
    _denied: set[tuple[str, str]] = field(default_factory=set)

    def use_role(self, rules: Iterable[Object], namespace: str = "") -> None:
        """Grant ``rules`` in ``namespace``, everywhere when it is empty (a ClusterRole)."""
        self._granted = self._granted or []
        self._granted += [(namespace, rule) for rule in rules]

    def deny(self, verb: str, resource: str) -> None:
        """``deny("create", "jobs")``, ``deny("get", "pods/log")``, whatever roles say."""
        self._denied.add((verb, resource))

    def allow(self, verb: str, resource: str) -> None:
        """Take a ``deny`` back."""
        self._denied.discard((verb, resource))

    def allow_everything(self) -> None:
        self._granted = None
        self._denied.clear()

    def allows(self, action: Action) -> bool:
        if (action.verb, action.resource) in self._denied:
            return False
        if self._granted is None:
            return True
        return any(
            namespace in ("", action.namespace) and _covers(rule, action)
            for namespace, rule in self._granted
        )

    def check(self, kind: Kind, action: Action) -> None:
        """Raise 403 in the authorizer's words."""
        if not self.allows(action):
            where = (
                f'in the namespace "{action.namespace}"'
                if action.namespace
                else "at the cluster scope"
            )
            raise refused(
                kind,
                action.name,
                f'User "{self.user}" cannot {action.verb} resource "{action.resource}" in API '
                f'group "{action.group}" {where}',
            )

    def review(self, spec: Object) -> Object:
        """``status`` of a SelfSubjectAccessReview."""
        wanted = spec.get("resourceAttributes")
        if wanted is None:
            return {"allowed": True}
        resource = wanted.get("resource", "*")
        if wanted.get("subresource"):
            resource += "/" + wanted["subresource"]
        action = Action(
            wanted.get("verb", "*"),
            wanted.get("group", ""),
            resource,
            wanted.get("namespace", ""),
            wanted.get("name", ""),
        )
        if self.allows(action):
            return {"allowed": True, "reason": "RBAC: allowed"}
        return {"allowed": False}

    def rules(self, namespace: str) -> Object:
        """``status`` of a SelfSubjectRulesReview."""
        everything = {"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}
        granted = [("", everything)] if self._granted is None else self._granted
        found = [rule for where, rule in granted if where in ("", namespace)]
        return {"resourceRules": found, "nonResourceRules": [], "incomplete": False}


def _covers(rule: Object, action: Action) -> bool:
    names = rule.get("resourceNames") or []
    _, slash, sub = action.resource.partition("/")
    resources = {action.resource, "*"} | ({f"*/{sub}"} if slash else set())
    return bool(
        {"*", action.verb} & set(rule["verbs"])
        and {"*", action.group} & set(rule.get("apiGroups") or [])
        and resources & set(rule.get("resources") or [])
        and (not names or action.name in names)
    )


def unauthorized() -> ApiError:
    return ApiError(401, "Unauthorized", "Unauthorized")
