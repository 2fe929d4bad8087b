"""What is served, and everything that its files say about themselves."""

from fastapi import APIRouter, Request

from service.repository import Model
from service.routes import ServiceDependency, choose_classifier
from service.routes.access import require_predict
from service.schemas import ModelBody, ModelDetailBody, ModelsBody

router = APIRouter(tags=["models"], dependencies=[require_predict])


@router.get("/models")
async def list_models(service: ServiceDependency) -> ModelsBody:
    """List the models that are served."""
    return ModelsBody(models=[ModelBody(**_short(model)) for model in service.models()])


@router.get("/models/{name}")
async def show_model(name: str, request: Request, service: ServiceDependency) -> ModelDetailBody:
    """Show a model: labels, preprocessing, what was folded, BatchNorm health, provenance."""
    classifier = choose_classifier(request, service, name)
    model = classifier.model
    described = model.manifest.model_dump(exclude={"schema_version", "name", "labels", "pixels"})
    return ModelDetailBody(
        **_short(model),
        **described,
        golden_images=model.golden_images,
        golden_difference=model.golden_difference,
        certificate=classifier.certificate,
    )


def _short(model: Model) -> dict[str, object]:
    return {
        "name": model.name,
        "version": model.version,
        "form": model.form,
        "digest": model.digest,
        "labels": list(model.manifest.labels),
    }
