"""The Ray Serve application: one endpoint in OpenAI's dialect for a base model and every adapter in the registry."""
