"""run.toml as pydantic models: the only place where a default is written. Imports pydantic and the standard library only."""

from schemas.config import SCHEMA_VERSION, RunConfig

__all__ = ["SCHEMA_VERSION", "RunConfig"]
