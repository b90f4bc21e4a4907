"""What Airflow learns of this provider, and its own section of the configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hcodec_airflow.provider import EXTRA_LINKS, get_provider_info
from hcodec_airflow.settings import read_settings
from hcodec_core.errors import ConfigError


def test_provider_info_fits_airflows_schema():
    from jsonschema import validate

    folder = Path(find_spec("airflow").submodule_search_locations[0])
    validate(get_provider_info(), json.loads((folder / "provider_info.schema.json").read_text()))


def test_airflow_finds_the_provider_its_link_and_its_section(tmp_path):
    code = (
        "from airflow.providers_manager import ProvidersManager\n"
        "from airflow.configuration import conf\n"
        "manager = ProvidersManager()\n"
        "assert 'hcodec-pipelines' in manager.providers, list(manager.providers)\n"
        "assert set({links!r}) <= set(manager.extra_links_class_names)\n"
        "assert conf.get('hcodec', 'backend') == 'local'\n"
        "assert conf.get('hcodec', 'report_base_url') == 'http://r'\n"
    ).replace("{links!r}", repr(list(EXTRA_LINKS)))
    environment = {
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__HCODEC__REPORT_BASE_URL": "http://r",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_entry_point_module_imports_nothing():
    """Airflow loads it while it is being imported itself."""
    code = (
        "import sys, __future__, typing; known = set(sys.modules); import hcodec_airflow.provider; "
        "print(*(set(sys.modules) - known))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.split(".")[0] for name in done.stdout.split()} == {"hcodec_airflow"}


def test_settings_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", "/etc/hcodec.toml")
    monkeypatch.setenv("AIRFLOW__HCODEC__LOCAL_THREADS", "3")
    monkeypatch.setenv("AIRFLOW__HCODEC__LOCAL_STATE_DIR", str(tmp_path))
    settings = read_settings()
    assert settings.config_path == Path("/etc/hcodec.toml")
    assert (settings.backend, settings.local_threads, settings.local_decoders) == ("local", 3, 1)
    assert settings.local_state_path == tmp_path
    monkeypatch.setenv("AIRFLOW__HCODEC__LOCAL_THREADS", "many")
    with pytest.raises(ConfigError, match="Option local_threads in section"):
        read_settings()


def test_missing_file_is_named(monkeypatch):
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", "/nowhere/hcodec.toml")
    with pytest.raises(ConfigError, match=r"/nowhere/hcodec\.toml does not exist"):
        read_settings().load_config()


def test_report_addresses_for_browsers(monkeypatch):
    monkeypatch.setenv("AIRFLOW__HCODEC__CONFIG_FILE", "/etc/hcodec.toml")
    assert read_settings().browser_url("s3://b/k.html") == "s3://b/k.html"
    monkeypatch.setenv("AIRFLOW__HCODEC__REPORT_BASE_URL", "http://127.0.0.1:9000/")
    settings = read_settings()
    assert settings.browser_url("s3://b/r/index.html") == "http://127.0.0.1:9000/b/r/index.html"
    assert settings.browser_url("file:///r/index.html") == "file:///r/index.html"
