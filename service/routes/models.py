"""What is served, and everything that its files say about themselves."""

from typing import Annotated

from fastapi import APIRouter, Query, Request

from service.repository import Model
from service.rollout import Plan
from service.routes import ServiceDependency, choose_classifier
from service.routes.access import require_predict
from service.schemas import FlipBody, ModelBody, ModelDetailBody, ModelQuery, ModelsBody, ServingBody, ShadowBody
from service.shadow import Shadow

router = APIRouter(tags=["models"], dependencies=[require_predict])


@router.get("/models")
async def list_models(service: ServiceDependency) -> ModelsBody:
    """List the models that are served."""
    models = service.models()
    only = models[0].name if len(models) == 1 else None
    return ModelsBody(
        models=[ModelBody(**_short(model)) for model in models], default=service.settings.default_model or only
    )


@router.get("/models/{name}")
async def show_model(
    name: str, request: Request, service: ServiceDependency, query: Annotated[ModelQuery, Query()]
) -> ModelDetailBody:
    """Show a model: labels, preprocessing, what was folded, BatchNorm health, provenance."""
    deployment = service.deployment(name)
    classifier = choose_classifier(request, service, name, query.version)
    model = classifier.model
    described = model.manifest.model_dump(exclude={"schema_version", "name", "labels", "pixels"})
    return ModelDetailBody(
        **_short(model),
        **described,
        golden_images=model.golden_images,
        golden_difference=model.golden_difference,
        certificate=classifier.certificate,
        serving=_serving(deployment.plan),
        shadow=None if deployment.shadow is None else _compared(deployment.shadow),
    )


def _serving(plan: Plan) -> ServingBody:
    return ServingBody(
        stable=plan.stable,
        canary=plan.canary,
        canary_share=plan.canary_share,
        shadow=plan.shadow,
        loaded=sorted(plan.versions),
    )


def _compared(shadow: Shadow) -> ShadowBody:
    comparison = shadow.comparison
    return ShadowBody(
        version=shadow.version,
        images=dict(comparison.outcomes),
        flips=[
            FlipBody(stable=label, shadow=other, count=count)
            for (label, other), count in comparison.flips.most_common()
        ],
        largest_difference=comparison.differences,
    )


def _short(model: Model) -> dict[str, object]:
    return {
        "name": model.name,
        "version": model.version,
        "form": model.form,
        "digest": model.digest,
        "labels": list(model.manifest.labels),
    }
