"""Checks helm/emu2 as far as it can be without a cluster: lint, rendering, schemas of Kubernetes, and what the rendered
objects say to each other and to the services. `make chart` runs it, in a virtual environment with requirements.txt.
"""

import json
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import config_fields
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "emu2"
JOB = ROOT / "deploy" / "train-job.yaml"
HELM = Path(sys.executable).parent / "helm"
KUBERNETES = "1.32"
# Kinds of operators, whose schemas Kubernetes does not have.
FOREIGN = {"PodMonitor"}

# Keys that the chart sets itself, so that values must not.
OWN_OF_ALL = {("server", "listen"), ("server", "admin")}
OWN_OF_ALL |= {("server", "tls", key) for key in ("mode", "cert_file", "key_file", "client_ca_file")}
OWN = {
    "router": {
        ("models",),
        *(("cache", key) for key in ("redis_url", "redis_ca_file", "redis_cert_file", "redis_key_file")),
        *(("auth", key) for key in ("mode", "tenants", "tenants_file")),
        *(("pool", "tls", key) for key in ("ca_file", "cert_file", "key_file", "server_name")),
    }
}
OWN_OF_STAGES = {("model_dir",), ("devices",), ("cores",)}

VOLUME = "models[0].volume.existingClaim=c,models[0].encoder.replicas=1,models[0].llm.replicas=1"
# Values that must be refused, and words that the refusal must hold.
REFUSED = {
    "router.replica=3": "Additional property replica is not allowed",
    "router.replicas=0": "greater than or equal to 1",
    "stages.llm.config.prefill_chunks=1": "Additional property prefill_chunks is not allowed",
    "stages.llm.config.max_beams=65": "less than or equal to 64",
    "router.config.cache.redis_url=redis://x": "Additional property redis_url is not allowed",
    "stages.encoder.gpus=2": "stages.encoder.gpus: Must be less than or equal to 1",
    "stages.llm.devices[0]=gpu": "stages.llm.devices.0: Does not match pattern",
    "stages.llm.devices[0]=cuda:0": "devices names cuda:0, but gpus is 0",
    r"stages.llm.resources.limits.nvidia\.com/gpu=1": "give GPUs as `gpus`",
    f"models[0].name=Emu2,{VOLUME}": "models.0.name: Does not match pattern",
    f"models[0].name=a,{VOLUME},models[0].volume.hostPath=/m": "exactly one of shipped, existingClaim, hostPath, pvc",
    "models[0].name=a,models[0].volume.shipped=nano,models[0].modelDir=b,models[0].encoder.replicas=1,models[0].llm.replicas=1": "is in the image",
    f"models[0].name=a,{VOLUME},models[0].modelDir=../x": "models.0.modelDir: Does not match pattern",
    f"models[0].name=a,{VOLUME},{VOLUME.replace('[0]', '[1]')},models[1].name=a": 'the name "a" is given twice',
    f"models[0].name=a,{VOLUME},fullnameOverride={'x' * 43}": "at most 52 fit",
    "router.auth.mode=open": "router.auth.mode must be one of the following",
    "router.auth.mode=tokens": "router.auth.existingSecret.name: String length must be greater than or equal to 1",
    "tls.clients.mode=server": "tls.clients.existingSecret: String length must be greater than or equal to 1",
    "tls.stages.mode=mutual": "tls.stages.serverSecret: String length must be greater than or equal to 1",
    "tls.stages.mode=server": "tls.stages.mode must be one of the following",
    "redis.mode=cluster": "redis.mode must be one of the following",
    "redis.mode=url": "redis.url: Does not match pattern",
    "redis.mode=existingSecret": "redis.existingSecret.name: String length must be greater than or equal to 1",
    "redis.mode=url,redis.url=redis://x:6379,redis.clientSecret=c": "caSecret and clientSecret are for TLS",
    "redis.mode=bundled,redis.caSecret.name=ca": "caSecret and clientSecret are for TLS",
    "redis.bundled.password=short": "redis.bundled.password: Does not match pattern",
    "router.extraEnv[0].name=EMU2__SERVER__LISTEN": "router.extraEnv.0.name",
}


def helm(*words):
    return subprocess.run([HELM, *words], capture_output=True, text=True, check=False)


def check_values(path):
    """Problems of one file of values."""
    lint = helm("lint", "--strict", "--quiet", CHART, "--values", path)
    if lint.returncode:
        return [lint.stdout + lint.stderr]
    rendered = helm("template", "emu2", CHART, "--kube-version", KUBERNETES, "--values", path)
    if rendered.returncode:
        return [rendered.stderr]
    objects = [item for item in yaml.safe_load_all(rendered.stdout) if item]
    problems = check_schemas(objects) + check_unique(objects)
    problems += check_tomls(objects) + check_endpoints(objects)
    for owner, template in pods(objects):
        problems += [f"{owner}: {problem}" for problem in check_pod(template, objects)]
    return problems


def check_job(job):
    problems = check_schemas([job])
    for owner, template in pods([job]):
        problems += [f"{owner}: {problem}" for problem in check_pod(template, [job])]
    return problems


def check_schemas(objects):
    problems = []
    for item in objects:
        if item["kind"] in FOREIGN:
            continue
        try:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            where = ".".join(str(step) for step in error.path)
            problems.append(f"{item['kind']} {item['metadata']['name']}: {where}: {error.message}")
    return problems


def check_unique(objects):
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    return [f"{kind} {name} is there twice" for kind, name in set(names) if names.count((kind, name)) > 1]


def of_kind(objects, *kinds):
    return {item["metadata"]["name"]: item for item in objects if item["kind"] in kinds}


def pods(objects):
    workloads = of_kind(objects, "Deployment", "Job")
    return [(name, item["spec"]["template"]) for name, item in workloads.items()]


def service_of(name):
    """The service whose configuration a ConfigMap holds: its name's last word."""
    return name.rsplit("-", 1)[1]


def tomls(objects):
    return {name: tomllib.loads(item["data"]["config.toml"]) for name, item in of_kind(objects, "ConfigMap").items()}


def check_tomls(objects):
    """The services refuse keys that they do not know, so a pod would never start."""
    problems = []
    for name, config in tomls(objects).items():
        for mistake in config_fields.mistakes(config, CONFIGS[service_of(name)]):
            problems.append(f"ConfigMap {name}: {mistake}")
    return problems


def check_endpoints(objects):
    """Every endpoint of the router is a headless Service of a Deployment's pods with a port that they serve, and every
    such Deployment has one."""
    listed = set()
    for config in tomls(objects).values():
        for model in config.get("models", []):
            listed |= {endpoint for stage in ("encoder", "llm", "decoder") for endpoint in model.get(stage, [])}
    served = set()
    for name, service in of_kind(objects, "Service").items():
        pods = [
            item["spec"]["template"]["spec"]["containers"][0]
            for item in of_kind(objects, "Deployment").values()
            if item["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
        ]
        stages = [pod for pod in pods if pod["name"] in ("encoder", "llm", "decoder")]
        for container in stages:
            port = next(port["containerPort"] for port in container["ports"] if port["name"] == "grpc")
            if service["spec"]["clusterIP"] != "None" or service["spec"]["ports"][0]["port"] != port:
                return [f"Service {name}: not headless, or not on port {port}"]
            scheme = "http" if tomls(objects)[name]["server"]["tls"]["mode"] == "none" else "https"
            served.add(f"dns+{scheme}://{name}:{port}")
    return [f"only the router or only a Deployment knows {endpoint}" for endpoint in listed ^ served]


def check_pod(template, objects):
    """What a pod may do, and that it agrees with its own configuration."""
    spec, problems = template["spec"], []
    security = spec["securityContext"]
    if spec["automountServiceAccountToken"] or not security["runAsNonRoot"] or not security["runAsUser"]:
        problems.append("runs as root or has a token of the API server")
    if security["seccompProfile"] != {"type": "RuntimeDefault"}:
        problems.append("runs without the runtime's seccomp profile")
    (container,) = spec["containers"]
    rights = container["securityContext"]
    kept = rights["allowPrivilegeEscalation"] or rights["capabilities"] != {"drop": ["ALL"]}
    if kept or not rights["readOnlyRootFilesystem"]:
        problems.append("may more than it needs")
    mounted = [volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume]
    # Redis has none.
    for name in mounted:
        problems += check_service_pod(spec, container, tomls(objects)[name])
    return problems


def check_service_pod(spec, container, config):
    problems = []
    grace_ms = config["server"].get("shutdown_grace_ms", 30_000)
    if spec["terminationGracePeriodSeconds"] * 1_000 <= grace_ms:
        problems.append("Kubernetes kills it before its shutdown grace is over")
    for name, key in (("grpc", "listen"), ("admin", "admin")):
        port = next(port["containerPort"] for port in container["ports"] if port["name"] == name)
        if int(config["server"][key].rsplit(":", 1)[1]) != port:
            problems.append(f"listens on {config['server'][key]}, but port {name} is {port}")
    known = config_fields.leaves(CONFIGS[container["name"]])
    for variable in container.get("env", []):
        prefix, _, key = variable["name"].partition("__")
        if prefix == "EMU2" and tuple(key.lower().split("__")) not in known:
            problems.append(f"{variable['name']} is no key of the service")
    return problems


def check_refused(item):
    values, words = item
    outcome = helm("template", "emu2", CHART, "--set", values)
    if outcome.returncode == 0:
        return [f"--set {values} is accepted"]
    return [] if words in outcome.stderr else [f"--set {values}: not {words!r} but: {outcome.stderr}"]


def check_schema_of_values(service):
    """`config` of the chart's schema has exactly the keys of the service that the chart leaves open."""
    definitions = json.loads((CHART / "values.schema.json").read_text())["definitions"]

    def keys(schema, path=()):
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
        if "properties" not in schema:
            return {path}
        return {leaf for key, inner in schema["properties"].items() for leaf in keys(inner, (*path, key))}

    own = OWN_OF_ALL | OWN.get(service, OWN_OF_STAGES)
    open_ = config_fields.leaves(CONFIGS[service]) - own
    differing = keys(definitions[f"{service}Config"]) ^ open_
    what = "only one of values.schema.json and the service's config.rs has"
    return [f"{service}: {what} {'.'.join(key)}" for key in sorted(differing)]


def main():
    files = sorted((CHART / "ci").glob("*.yaml"))
    with ThreadPoolExecutor() as threads:
        found = [(path.name, problems) for path, problems in zip(files, threads.map(check_values, files))]
        found += [("refusals", problems) for problems in threads.map(check_refused, REFUSED.items())]
    found += [("values.schema.json", check_schema_of_values(service)) for service in config_fields.SERVICES]
    found.append((JOB.name, check_job(yaml.safe_load(JOB.read_text()))))
    problems = [f"{where}: {problem}" for where, problems in found for problem in problems]
    print("\n".join(problems) or f"chart: {len(files)} files of values, {len(REFUSED)} refusals: in order")
    return 1 if problems else 0


CONFIGS = config_fields.configs()

if __name__ == "__main__":
    sys.exit(main())
