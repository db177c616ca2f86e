// The viewer's settings for this archive: its DICOMweb service, and the token of the page that opened it.
window.config = ({ servicesManager }) => {
  const signIn = configuration => {
    const token = sessionStorage.getItem('sphere.token');
    if (token) {
      const getAuthorizationHeader = () => ({ Authorization: `Bearer ${token}` });
      servicesManager.services.userAuthenticationService.setServiceImplementation({ getAuthorizationHeader });
    }
    return configuration;
  };
  const service = `${location.origin}/dicom-web`;
  return {
    name: 'sphere',
    routerBasename: '/viewer',
    extensions: [],
    modes: [],
    customizationService: {},
    showStudyList: true,
    maxNumberOfWebWorkers: 3,
    showWarningMessageForCrossOrigin: false,
    showCPUFallbackMessage: true,
    showLoadingIndicator: true,
    strictZSpacingForVolumeViewport: true,
    groupEnabledModesFirst: true,
    maxNumRequests: { interaction: 100, thumbnail: 5, prefetch: 25 },
    showErrorDetails: 'always',
    defaultDataSourceName: 'archive',
    dataSources: [
      {
        namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
        sourceName: 'archive',
        configuration: {
          friendlyName: 'SPHERE',
          name: 'archive',
          qidoRoot: service,
          wadoRoot: service,
          wadoUriRoot: `${location.origin}/wado`,
          qidoSupportsIncludeField: true,
          supportsFuzzyMatching: true,
          supportsWildcard: true,
          supportsStow: true,
          supportsReject: false,
          imageRendering: 'wadors',
          thumbnailRendering: 'thumbnail',
          thumbnailRequestStrategy: 'fetch',
          enableStudyLazyLoad: true,
          singlepart: 'bulkdata,video,pdf',
          bulkDataURI: { enabled: true },
          omitQuotationForMultipartRequest: false,
          onConfiguration: signIn,
        },
      },
    ],
  };
};
