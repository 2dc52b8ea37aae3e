"""The fields of ray.io/v1 in KubeRay 1.7.0: names, types and allowed values, as JSON schemas.

Nothing else is allowed where a field is named; pod templates and the like are left to Kubernetes'
own schemas. Compared once, field by field, with the operator's resource definitions at tag v1.7.0
(docs/kubernetes.md).
"""

from typing import Any

DEFINITIONS = "https://kubernetes.io/api/_definitions.json"
"""Address of Kubernetes' own definitions."""

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
AMOUNT: Schema = {"type": "number", "minimum": 0}
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}


def fields(*required: str, **properties: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def several(schema: Schema, **limits: Any) -> Schema:
    return {"type": "array", "items": schema, **limits}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def kubernetes(name: str) -> Schema:
    return {"$ref": f"{DEFINITIONS}#/$defs/io.k8s.{name}"}


def core(name: str) -> Schema:
    return kubernetes(f"api.core.v1.{name}")


def resource(kind: str, spec: Schema) -> Schema:
    return fields(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": kind},
        metadata=kubernetes("apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        spec=spec,
    )


MANAGERS = one_of("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
NETWORK_RULES = {
    "ingressRules": several(kubernetes("api.networking.v1.NetworkPolicyIngressRule")),
    "egressRules": several(kubernetes("api.networking.v1.NetworkPolicyEgressRule")),
}
CREDENTIAL = fields(value=TEXT, valueFrom=core("EnvVarSource"))
GROUP = {
    "resources": TEXTS,
    "labels": TEXTS,
    "rayStartParams": TEXTS,
    "template": core("PodTemplateSpec"),
}
CONTAINER = {
    "image": TEXT,
    "imagePullPolicy": one_of("Always", "IfNotPresent", "Never"),
    "env": several(core("EnvVar")),
    "resources": core("ResourceRequirements"),
}
HEAD = fields(
    "template",
    **GROUP,
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
    headService=core("Service"),
    enableIngress=FLAG,
    ingressOptions=fields(
        host=TEXT,
        path=TEXT,
        pathType=one_of("Exact", "Prefix", "ImplementationSpecific"),
        tls=several(fields(hosts=several(TEXT), secretName=TEXT)),
    ),
)
WORKERS = fields(
    *("groupName", "minReplicas", "maxReplicas", "template"),
    **GROUP,
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=POSITIVE,
    idleTimeoutSeconds=COUNT,
    priority={"type": "integer"},
    suspend=FLAG,
    scaleStrategy=fields(workersToDelete=several(TEXT)),
)
CLUSTER = fields(
    "headGroupSpec",
    headGroupSpec=HEAD,
    workerGroupSpecs=several(WORKERS),
    rayVersion=TEXT,
    suspend=FLAG,
    managedBy=MANAGERS,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=fields(
        **CONTAINER,
        version=one_of("v1", "v2"),
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=COUNT,
        command=several(TEXT),
        args=several(TEXT),
        envFrom=several(core("EnvFromSource")),
        securityContext=core("SecurityContext"),
        volumeMounts=several(core("VolumeMount")),
    ),
    authOptions=fields(mode=one_of("disabled", "token"), secretName=TEXT, enableK8sTokenAuth=FLAG),
    tlsOptions=fields(enabled=FLAG),
    upgradeStrategy=fields(type=one_of("Recreate", "None")),
    networkPolicy=fields(
        mode=one_of("DenyAll", "DenyAllIngress", "DenyAllEgress"),
        head=fields(**NETWORK_RULES),
        worker=fields(**NETWORK_RULES),
        workerGroups=several(fields("groupName", groupName=TEXT, **NETWORK_RULES)),
    ),
    gcsFaultToleranceOptions=fields(
        backend=one_of("redis", "rocksdb"),
        externalStorageNamespace=TEXT,
        redisAddress=TEXT,
        redisUsername=CREDENTIAL,
        redisPassword=CREDENTIAL,
        storage=fields(
            accessModes=several(TEXT),
            claimName=TEXT,
            deletionPolicy=one_of("DeleteWithCluster", "Retain"),
            size={"type": ["string", "integer"]},
            storageClassName=TEXT,
            subPath=TEXT,
        ),
    ),
    historyServerOptions=fields(collectorOptions=fields(**CONTAINER)),
)
DELETION = one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone")
JOB = fields(
    rayClusterSpec=CLUSTER,
    clusterSelector=TEXTS,
    entrypoint=TEXT,
    entrypointNumCpus=AMOUNT,
    entrypointNumGpus=AMOUNT,
    entrypointResources=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    metadata=TEXTS,
    suspend=FLAG,
    managedBy=MANAGERS,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    submitterConfig=fields(backoffLimit=COUNT),
    submitterPodTemplate=core("PodTemplateSpec"),
    backoffLimit=COUNT,
    activeDeadlineSeconds=POSITIVE,
    preRunningDeadlineSeconds=POSITIVE,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    deletionStrategy=fields(
        onSuccess=fields(policy=DELETION),
        onFailure=fields(policy=DELETION),
        deletionRules=several(
            fields(
                *("condition", "policy"),
                policy=DELETION,
                condition=fields(
                    jobStatus=one_of("SUCCEEDED", "FAILED"),
                    jobDeploymentStatus=one_of("Failed"),
                    ttlSeconds=COUNT,
                ),
            ),
            minItems=1,
        ),
    ),
)
KINDS = {"RayCluster": resource("RayCluster", CLUSTER), "RayJob": resource("RayJob", JOB)}
