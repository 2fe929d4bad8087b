"""Certifying a model of the repository: what `serve` does for each at load, and `foldserve certify` for one."""

import logging
from collections.abc import Mapping
from typing import Any

from service.artifact import parse_model
from service.config import Settings, cpu_count
from service.engine import Device, choose_device, open_engine
from service.exact_engine import ExactEngine
from service.independence.certificate import Certificate, CertificateStore
from service.independence.certify import Subject, candidates, certify, subject_of
from service.independence.effort import FULL, QUICK
from service.independence.probe import Report
from service.repository import Model, Repository

logger = logging.getLogger(__name__)


def certify_model(
    model: Model, device: Device, settings: Settings, report: Report, made_beside: Mapping[str, Certificate]
) -> Certificate:
    """Return the certificate of a loaded model, a refusal included.

    `made_beside`: certificates that other processes of this service have just made here, by fingerprint digest; one
    of the same fingerprint is taken over without a probe. Raises NotCertified as `certify` does.
    """
    store = CertificateStore(settings.state)
    return _certified(model, device, settings, store, report=report, made_beside=made_beside)[1]


def _certified(
    model: Model, device: Device, settings: Settings, store: CertificateStore, **options: Any
) -> tuple[Subject, Certificate]:
    """Certify a model; an exact one goes on to its next execution where no shape of one keeps the integers."""
    subject = _subject(model, device, settings)
    certificate = certify(subject, store, **options)
    while _may_fall_back(certificate) and isinstance(model.engine, ExactEngine) and model.engine.fall_back():
        logger.warning("model %s: %s; trying the execution %s", model.name, certificate.reason, model.engine.execution)
        subject = _subject(model, device, settings)
        certificate = certify(subject, store, **options)
    return subject, certificate


def _may_fall_back(certificate: Certificate) -> bool:
    return certificate.verdict == "refused" and certificate.proof.verdict == "independent"  # else no kernel is at fault


def certify_named(
    name: str, settings: Settings, *, quick: bool, fresh: bool, report: Report
) -> tuple[Subject, Certificate]:
    """Load `NAME` or `NAME@VERSION` and certify it; `quick` neither reads nor keeps a certificate.

    Raises ConfigurationError for a version that is no number, ArtifactError, DeviceError or NotCertified.
    """
    name, version = parse_model(name)
    device = choose_device(settings.device)
    model = Repository(settings.models, open_engine, settings.form).load(name, device, version)
    store = CertificateStore(None if quick else settings.state)
    effort = QUICK if quick else FULL
    return _certified(model, device, settings, store, fresh=fresh or quick, effort=effort, report=report)


def _subject(model: Model, device: Device, settings: Settings) -> Subject:
    shapes = candidates(cpu_count(), device.used, settings.max_batch_size)
    lanes = cpu_count() if device.used == "cpu" else 1
    return subject_of(model.name, model.version, model.artifact, model.engine, shapes, lanes)
