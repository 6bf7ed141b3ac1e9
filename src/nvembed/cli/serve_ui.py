"""``nvembed serve DB --ui``: the page of a database."""

from __future__ import annotations

from pathlib import Path

import typer

from nvembed.core.dtypes import PrecisionChoice


def serve_page(
    place: str, *, host: str, port: int, model: str | None = None, dtype: PrecisionChoice = "auto"
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        place: folder of the database.
        host: address to listen on.
        port: as is.
        model: where the model of the database lies now; None is where it lay.
        dtype: of its weights.

    Raises:
        UserError: there is no database, or its model is another.
    """
    import uvicorn

    from nvembed.index.database import Database
    from nvembed.index.page import page_app
    from nvembed.index.record import recorded_encoder

    database = Database.open(Path(place))
    encoder = recorded_encoder(database.record, model, dtype, place)
    typer.echo(f"{database.count()} documents: http://{host}:{port}/ (Ctrl-C ends it)")
    uvicorn.run(page_app(database, encoder), host=host, port=port, log_level="warning")
