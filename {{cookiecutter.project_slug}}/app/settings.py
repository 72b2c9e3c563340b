"""The service's settings: environment variables that start with TASKFLOW_, or the file .env."""

from typing import Literal

from pydantic import AwareDatetime, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="TASKFLOW_",
        env_file=".env",
        hide_input_in_errors=True,  # which may be a password
        extra="ignore",
    )

    url: str = "sqlite:///tasks.db"
    """Where tasks are stored."""
    env: Literal["development", "production"] = "development"
    version: str = ""
    """What is deployed, as the dashboard shows it: a tag or a commit. Without, a checksum of the code."""
    path: str = "/tasks"
    """Where the API and the dashboard are."""
    run: bool = True
    """Whether this process runs tasks; otherwise it only accepts them."""
    cluster: str | None = None
    """The scheduler of a Dask cluster on which `executor="process"` runs; without, in processes of this machine."""
    delivery: SecretStr | None = None
    """The broker of a fleet of workers that tasks are handed to, in a project that was made with one."""
    admin_username: str | None = None
    admin_password: SecretStr | None = None
    reader_username: str | None = None
    """Somebody who may look at tasks and change none."""
    reader_password: SecretStr | None = None
    secret_key: SecretStr | None = None
    """Signs the dashboard's sessions. Without one, development makes a new key at each start."""
    encryption_key: SecretStr | None = None
    """Encrypts arguments and results at rest."""
    encrypted_since: AwareDatetime | None = None
    """When the key was first set: older tasks may be unencrypted. Without, none is read that is not encrypted."""
    retention_days: float | None = Field(default=None, gt=0)
    """Days after which finished tasks are deleted; without, they are kept."""

    @model_validator(mode="before")
    @classmethod
    def nothing_is_empty(cls, given: dict[str, object]) -> dict[str, object]:
        """A secret that was not filled in must not mean a database that nobody finds again, or no encryption."""
        for name, value in given.items():
            if value == "" and name != "version":
                raise ValueError(f"TASKFLOW_{name.upper()} is empty: give it a value, or take it out")
        return given

    @model_validator(mode="after")
    def credentials_come_in_pairs(self) -> "Settings":
        for who in ("admin", "reader"):
            if (getattr(self, f"{who}_username") is None) != (getattr(self, f"{who}_password") is None):
                name = f"TASKFLOW_{who.upper()}"
                raise ValueError(f"set both {name}_USERNAME and {name}_PASSWORD, or neither")
        if self.reader_username is not None and self.admin_username is None:
            raise ValueError("TASKFLOW_READER_USERNAME needs TASKFLOW_ADMIN_USERNAME, too")
        return self

    @property
    def auth(self) -> list[tuple[str, str, str]] | None:
        """Names, passwords and roles."""
        known = (
            (self.admin_username, self.admin_password, "operate"),
            (self.reader_username, self.reader_password, "read"),
        )
        return [(name, secret.get_secret_value(), role) for name, secret, role in known if name and secret] or None


settings = Settings()


def secret(value: SecretStr | None) -> str | None:
    return None if value is None else value.get_secret_value()
