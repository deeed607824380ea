"""Named settings as YAML files; each opens with the commands that prepare, run and override it."""
