"""A broadcaster that knows programs by their certificates; no secret is shared."""

from lonelypsp.auth.config import AuthConfigFromParts
from lonelypsp.errors import AuthResult
from lonelypsp.signing import Fields, Nothing
from lonelypss.config import BroadcasterConfig
from lonelypss.server import run

MAY_NOTIFY = {"orders.example"}


class ByCertificate:
    def authorize(self, operation: str, fields: Fields, now: float) -> str | None:
        return None

    def check(
        self, operation: str, fields: Fields, authorization: str | None, now: float
    ) -> AuthResult:
        if operation.startswith("CONFIRM_"):
            return AuthResult.OK  # an answer: TLS has verified who gives it
        certificate = fields.get("peer_certificate")
        if certificate is None:
            return AuthResult.UNAUTHORIZED
        names = {value for kind, value in certificate["subjectAltName"] if kind == "DNS"}
        if operation == "NOTIFY" and not names & MAY_NOTIFY:
            return AuthResult.FORBIDDEN
        return AuthResult.OK


config = BroadcasterConfig(
    db="sqlite:///lonelypss.db",
    # who connects to us: our certificate, and whose certificates we take
    tls_cert="broadcaster.crt",
    tls_key="broadcaster.key",
    tls_client_ca="ca.pem",
    # whom we connect to, to pass messages on
    outgoing_ca_file="ca.pem",
    outgoing_client_cert="broadcaster.crt",
    outgoing_client_key="broadcaster.key",
    auth=AuthConfigFromParts(to_broadcaster=ByCertificate(), to_subscriber=Nothing()),
)

if __name__ == "__main__":
    run(config, host="0.0.0.0", port=3003)
