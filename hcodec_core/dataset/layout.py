"""Where everything of one dataset lies.

<work_uri>/datasets/<dataset>/<encode id, 12 digits>/
    plans/<plan_id>/              a plan with its leases, results and logs (see ``jobs``)
    versions/v<N>.json            version records
    cards/v<N>/                   dataset cards: index.html, card.json
    quarantine/<plan_id>.parquet  files without tokens, of published plans
    drift/                        windows that were judged, and their evidence (``monitoring``)
<warehouse_uri>/<namespace>/<dataset>__<encode id, 12 digits>/
    metadata/                     Iceberg
    data/<plan_id>/               Parquet files of one plan
"""

from __future__ import annotations

from dataclasses import dataclass

from hcodec_core.config import Config
from hcodec_core.storage import join_uri

_SHORT_ID = 12


@dataclass(frozen=True)
class DatasetLayout:
    """Places of the tokens of ``dataset`` under one ``encode_id``."""

    config: Config
    dataset: str
    encode_id: str

    @property
    def table_name(self) -> str:
        """Name of the table within the catalog's namespace."""
        return f"{self.dataset}__{self.encode_id[:_SHORT_ID]}"

    @property
    def table_identifier(self) -> tuple[str, str]:
        """Namespace and name of the table."""
        return self.config.catalog.namespace, self.table_name

    @property
    def table_uri(self) -> str:
        """Folder of the table's data and metadata."""
        return join_uri(self.config.catalog.warehouse_uri, *self.table_identifier)

    @property
    def data_uri(self) -> str:
        """Folder of all plans' data files."""
        return join_uri(self.table_uri, "data")

    @property
    def work_uri(self) -> str:
        """Folder of plans, versions and quarantine."""
        work_uri = self.config.work.work_uri
        return join_uri(work_uri, "datasets", self.dataset, self.encode_id[:_SHORT_ID])

    @property
    def plans_uri(self) -> str:
        """Folder of all plans."""
        return join_uri(self.work_uri, "plans")

    @property
    def quarantine_uri(self) -> str:
        """Folder of the quarantine files of published plans."""
        return join_uri(self.work_uri, "quarantine")

    @property
    def drift_uri(self) -> str:
        """Folder of what monitoring found."""
        return join_uri(self.work_uri, "drift")

    def plan_uri(self, plan_id: str) -> str:
        """Folder of one plan."""
        return join_uri(self.plans_uri, plan_id)

    def plan_data_uri(self, plan_id: str) -> str:
        """Folder of one plan's data files."""
        return join_uri(self.data_uri, plan_id)

    def version_uri(self, version: str) -> str:
        """Record of one version (``v3``)."""
        return join_uri(self.work_uri, "versions", f"{version}.json")

    def card_uri(self, version: str) -> str:
        """Folder of the dataset card of one version."""
        return join_uri(self.work_uri, "cards", version)
