"""URIs on the S3 server that the tests start."""


def s3_uri(port, path):
    return f"s3://{path}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1&allow_bucket_creation=true"
